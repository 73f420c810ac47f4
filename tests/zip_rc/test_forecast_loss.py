"""The loss of forecasts against plain computations, and the worked examples of the KL term."""

from __future__ import annotations

import pytest
import torch

from posttrain.training.logprobs import OutputHead
from posttrain.zip_rc.loss import States, chunked_kl, slice_logits

RESERVED = slice(20, 26)
KEPT = torch.tensor([*range(20), *range(26, 30)])


def make(seed, n=7, h=8, v=30, bias=True, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=generator), torch.randn(v, h, generator=generator)
    offset = torch.randn(v, generator=generator) if bias else None
    return hidden.double(), OutputHead(
        weight.double(), None if offset is None else offset.double(), reserved=RESERVED, **head
    )


def logprobs(hidden, head):
    z = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z[:, KEPT].log_softmax(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "softcap": 4.0, "scale": 0.5}], ids=["plain", "capped"]
)
def test_kl_over_the_unreserved_tokens_and_its_gradients(options, chunk_size):
    hidden, head = make(0, **options)
    frozen = States(*make(1, **options))
    leaves = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(hidden), dtype=torch.float64)
    kl = chunked_kl(hidden, head, frozen, chunk_size=chunk_size)
    reference = logprobs(frozen.hidden, frozen.head)
    expected = (reference.exp() * (reference - logprobs(hidden, head))).sum(-1)
    torch.testing.assert_close(kl, expected)
    found = torch.autograd.grad((weights * kl).sum(), leaves)
    plain = torch.autograd.grad((weights * expected).sum(), leaves)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found[1][RESERVED].any()


def test_equal_models_have_no_kl_and_no_gradient():
    hidden, head = make(0)
    head.weight.requires_grad_()
    kl = chunked_kl(hidden, head, States(hidden, head))
    assert kl.abs().max() < 1e-12
    kl.sum().backward()
    assert head.weight.grad.abs().max() < 1e-12


def test_truncated_kl_of_equal_models_is_minus_log_of_the_mass_that_is_kept():
    hidden, head = make(0)
    hidden.requires_grad_()
    kl = chunked_kl(hidden, head, States(hidden.detach(), head), top=5)
    mass = logprobs(hidden.detach(), head).exp().topk(5).values.sum(-1)
    torch.testing.assert_close(kl.detach(), -mass.log())
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    assert gradient.norm() > 0.1  # it sharpens
    whole = chunked_kl(hidden, head, States(hidden.detach(), head), top=1000)
    assert whole.abs().max() < 1e-12


def test_slice_logits_touch_nothing_but_the_slice():
    hidden, head = make(3, softcap=4.0, scale=0.5)
    head.weight.requires_grad_()
    logits = slice_logits(hidden, head)
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)[:, RESERVED]
    torch.testing.assert_close(logits, 4.0 * torch.tanh(0.5 * raw / 4.0))
    logits.square().sum().backward()
    outside = head.weight.grad.clone()
    outside[RESERVED] = 0.0
    assert not outside.any()
    assert head.weight.grad[RESERVED].any()


def test_log_probs_over_the_vocabulary_are_lower_by_the_mass_of_the_slice():
    hidden, head = make(4)
    full = torch.nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)
    reserved = full[:, RESERVED].exp().sum(-1, keepdim=True)
    torch.testing.assert_close(full[:, KEPT], logprobs(hidden, head) + torch.log1p(-reserved))
