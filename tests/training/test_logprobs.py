from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.errors import TrainingError
from posttrain.rollout.weights import named_weights
from posttrain.training import logprobs as module
from posttrain.training.batch import PaddedPacking, TrainRow
from posttrain.training.forward import choose_packing, policy_logprobs, prepare_model, verify_packing
from posttrain.training.logprobs import OutputHead, chunk_tokens, chunked_logprobs, output_head
from posttrain.zip_rc.grid import OUTCOMES, Grid


def plain(hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None, scale=1.0):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)) / temperature, -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def make_inputs(n=23, h=16, v=101, dtype=torch.float32, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(v, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, v, (n,), generator=generator)


def outputs_and_gradients(function, hidden, weight, bias, targets, **options):
    logprobs, entropy = function(hidden, weight, targets, bias=bias, **options)
    coefficients = torch.linspace(-1.0, 2.0, len(targets), dtype=logprobs.dtype)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    loss = (coefficients * logprobs).sum() + (coefficients.flip(0) * entropy).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("chunk_size", [1, 7, 23, 1000, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"softcap": 3.0}, {"softcap": 3.0, "temperature": 1.7, "scale": 0.25}],
    ids=["plain", "temperature", "softcap", "all"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_log_softmax(options, bias, chunk_size):
    inputs = make_inputs(bias=bias)
    expected = outputs_and_gradients(plain, *inputs, **options)
    actual = outputs_and_gradients(chunked_logprobs, *inputs, **options, chunk_size=chunk_size)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_worked_example():
    # logits (ln 1, ln 2, ln 5): p = (1/8, 2/8, 5/8), H = 0.125·ln 8 + 0.25·ln 4 + 0.625·ln 1.6 = 0.900256
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    hidden = torch.ones(3, 1, requires_grad=True)
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.125, 0.25, 0.625]))
    torch.testing.assert_close(entropy, torch.full((3,), 0.900256))
    # d log p_0 / dh = w_0 - Σ p_j w_j = 0 - (0.25·ln 2 + 0.625·ln 5) = -1.179186
    (gradient,) = torch.autograd.grad(logprobs[0], hidden)
    torch.testing.assert_close(gradient, torch.tensor([[-1.179186], [0.0], [0.0]]))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_both_outputs(softcap):
    hidden, weight, bias, targets = make_inputs(5, 4, 7, torch.float64)
    targets[0] = targets[1]  # the same token twice

    def function(*inputs):
        h, w, b = inputs
        return chunked_logprobs(
            h, w, targets, bias=b, temperature=0.8, softcap=softcap, scale=1.5, chunk_size=2
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(0, 12),
    v=st.integers(1, 40),
    chunk_size=st.integers(1, 15),
    seed=st.integers(0, 1000),
    width=st.floats(0.0, 30.0),
)
def test_any_shape_and_chunk(n, v, chunk_size, seed, width):
    hidden, weight, _, targets = make_inputs(n, 3, v, torch.float64, seed, bias=False)
    scaled = (width * hidden).detach().requires_grad_()
    expected = outputs_and_gradients(plain, scaled, weight, None, targets)
    actual = outputs_and_gradients(chunked_logprobs, scaled, weight, None, targets, chunk_size=chunk_size)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_large_logits_stay_finite():
    weight = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logprobs, entropy = chunked_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -2e4]))
    (gradient,) = torch.autograd.grad(entropy.sum() + logprobs.sum(), weight)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0], [1.0]]))


def test_small_entropy_is_exact():
    # One token is e^30 times as likely as each of 100 others. Taken from logits of 130 the entropy would be
    # wrong by 8e-6, float32's spacing there.
    weight = torch.cat([torch.tensor([[130.0]]), torch.full((100, 1), 100.0)])
    _, entropy = chunked_logprobs(torch.ones(1, 1), weight, torch.tensor([0]))
    _, expected = plain(torch.ones(1, 1).double(), weight.double(), torch.tensor([0]))
    torch.testing.assert_close(entropy.double(), expected, rtol=0.05, atol=0.0)


def test_bfloat16_accumulates_in_float32():
    hidden, weight, _, targets = make_inputs(4096, 8, 33, torch.bfloat16, bias=False)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]

    def gradients(function, h, w, **options):
        logprobs, _ = function(h, w, targets, **options)
        return logprobs, torch.autograd.grad(logprobs.sum(), (h, w))

    expected_logprobs, (expected_hidden, expected_weight) = gradients(plain, *exact)
    logprobs, (grad_hidden, grad_weight) = gradients(chunked_logprobs, hidden, weight, chunk_size=16)
    assert (logprobs.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, *2 * [torch.bfloat16])
    # The logits themselves are not rounded to bfloat16, whose spacing at 8 is 0.06.
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_hidden.double(), expected_hidden, rtol=0.02, atol=0.02)
    # 256 chunks: a bfloat16 sum would stop growing long before; one final rounding is 2⁻⁹.
    error = (grad_weight.double() - expected_weight).norm() / expected_weight.norm()
    assert error < 4e-3


def test_autocast_does_not_round_the_logits():
    hidden, weight, _, targets = make_inputs(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(chunked_logprobs, hidden, weight, None, targets)
    for a, b in zip(actual, outputs_and_gradients(plain, hidden, weight, None, targets), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and how many of the weight's size there were."""

    def __init__(self, weight_elements: int) -> None:
        super().__init__()
        self.largest, self.weight_sized, self.weight_elements = 0, 0, weight_elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                self.weight_sized += tensor.numel() == self.weight_elements and "zeros" in func.name()
        return output


def watch(function, hidden, weight, targets, entropy_weight, **options):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with LargestTensor(weight.numel()) as mode, hooks:
        logprobs, entropy = function(hidden, weight, targets, **options)
        (logprobs.sum() + entropy_weight * entropy.sum()).backward()
    return mode, max(saved)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_never_holds_all_logits(softcap, entropy_weight):
    n, h, v, chunk_size = 64, 4, 300, 8
    hidden, weight, _, targets = make_inputs(n, h, v, bias=False)
    mode, saved = watch(
        chunked_logprobs, hidden, weight, targets, entropy_weight, softcap=softcap, chunk_size=chunk_size
    )
    assert mode.largest == chunk_size * v
    assert saved == max(n * h, v * h)
    mode, saved = watch(plain, hidden, weight, targets, entropy_weight, softcap=softcap)
    assert mode.largest == saved == n * v  # what the measurement shows for the plain computation


def test_no_gradient_buffer_for_a_frozen_head():
    hidden, weight, _, targets = make_inputs(64, 4, 300, bias=False)
    mode, _ = watch(chunked_logprobs, hidden, weight, targets, 0.0, chunk_size=8)
    assert mode.weight_sized == 1
    mode, _ = watch(chunked_logprobs, hidden, weight.detach(), targets, 0.0, chunk_size=8)
    assert mode.weight_sized == 0
    assert hidden.grad is not None


def test_unused_entropy_costs_no_backward(monkeypatch):
    seen = []
    original = module._logit_gradient_

    def spy(log_p, targets, grad_logprobs, grad_entropy, entropy):
        seen.append((grad_logprobs is not None, grad_entropy is not None))
        return original(log_p, targets, grad_logprobs, grad_entropy, entropy)

    monkeypatch.setattr(module, "_logit_gradient_", spy)
    hidden, weight, _, targets = make_inputs(bias=False)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets)
    (logprobs.sum() + 0.0 * entropy.detach().sum()).backward()
    logprobs, entropy = chunked_logprobs(hidden, weight, targets)
    entropy.sum().backward()
    assert seen == [(True, False), (False, True)]


def test_chunk_tokens_follow_the_byte_budget():
    assert chunk_tokens(1000, 4, budget=4_000_000) == 1000
    assert (
        chunk_tokens(151_936) * 151_936 * 4 <= module.CHUNK_BYTES < (chunk_tokens(151_936) + 1) * 151_936 * 4
    )
    assert chunk_tokens(10**9, 4, budget=1) == 1


# ---- output heads


def tiny(kind, **options):
    import transformers

    common = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }
    config = getattr(transformers, f"{kind}Config")(**common, **options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def head_logprobs(model, ids):
    head = output_head(model)
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
    return chunked_logprobs(
        hidden, head.weight, ids[0, 1:], bias=head.bias, softcap=head.softcap, scale=head.scale, chunk_size=3
    )[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen2", {}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),  # has a bias
    ],
)
def test_head_of_real_architectures(kind, options):
    model = tiny(kind, **options)
    if kind == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
        assert output_head(model).bias is model.lm_head.bias
    ids = torch.tensor([[1, 5, 9, 33, 2, 7]])
    logits = model(input_ids=ids).logits[0, :-1].float()
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(head_logprobs(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_head_behind_lora_and_under_a_full_adapter():
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(tiny("Qwen2"), LoraConfig(target_modules="all-linear"))
    assert output_head(lora).weight is lora.get_output_embeddings().weight
    assert not output_head(lora).weight.requires_grad

    saved = get_peft_model(tiny("Qwen2"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert output_head(saved).weight.requires_grad
    with saved.disable_adapter():
        assert not output_head(saved).weight.requires_grad

    adapted = get_peft_model(tiny("Qwen2"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(TrainingError, match="output head"):
        output_head(adapted)


def test_head_multiplier_of_hyperclova():
    config = SimpleNamespace(model_type="hyperclovax", logits_scaling=4.0)
    config.get_text_config = lambda: config
    head = torch.nn.Linear(2, 3)
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    assert output_head(model) == OutputHead(head.weight, head.bias, None, 4.0)


# ---- the head inside its module


def scores(model, ids, **options):
    """Log-probs and entropies of a sequence's tokens, through the model's own forward."""
    rows = [TrainRow(tuple(ids), np.arange(1, len(ids)))]
    micro = PaddedPacking().collate(rows, torch.device("cpu"))
    return policy_logprobs(model, model, micro, temperature=1.0, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),
    ],
)
def test_what_a_model_does_after_its_head_does_not_reach_the_scores(kind, options):
    model = tiny(kind, **options)
    ids = torch.tensor([[1, 5, 9, 33, 2, 7]])
    plain_logits = model(input_ids=ids).logits
    prepare_model(model)
    torch.testing.assert_close(model(input_ids=ids).logits, plain_logits)
    log_p = torch.log_softmax(plain_logits[0, :-1].float(), -1)
    logprobs, entropy = scores(model, ids[0].tolist(), train_entropy=True)
    torch.testing.assert_close(logprobs, log_p.gather(1, ids[0, 1:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert entropy.requires_grad
    assert not scores(model, ids[0].tolist())[1].requires_grad
    device = torch.device("cpu")
    assert verify_packing(model, model, choose_packing(model), device).name == "tree"


def test_a_model_with_an_unknown_step_after_its_head_is_refused():
    def step(module, args, output):
        output.logits = 1.5 * output.logits

    model = tiny("Qwen2")
    prepare_model(model)
    model.register_forward_hook(step)
    with pytest.raises(TrainingError, match="Qwen2ForCausalLM"):
        verify_packing(model, model, choose_packing(model), torch.device("cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_stays_what_it_was(tied, tmp_path):
    model = tiny("Qwen2", tie_word_embeddings=tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sent = dict(named_weights(model))
    model.save_pretrained(tmp_path / "before")
    prepare_model(model)
    prepare_model(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {name: weight.data_ptr() for name, weight in named_weights(model)} == {
        name: weight.data_ptr() for name, weight in sent.items()
    }
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_adapters_beside_and_around_the_head():
    from peft import LoraConfig, get_peft_model

    ids = [1, 5, 9, 33, 2]
    model = tiny("Qwen2")
    expected, _ = scores_of_plain(model, ids)
    lora = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    prepare_model(lora)
    torch.testing.assert_close(scores(lora, ids)[0], expected, rtol=1e-5, atol=1e-5)

    saved = get_peft_model(tiny("Qwen2"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    names = list(saved.state_dict())
    prepare_model(saved)
    assert list(saved.state_dict()) == names
    scores(saved, ids)[0].sum().backward()
    assert output_head(saved).weight.grad is not None
    torch.nn.init.zeros_(output_head(saved).weight)
    torch.testing.assert_close(scores(saved, ids)[0], torch.full((4,), -math.log(40)))
    with saved.disable_adapter():
        torch.testing.assert_close(scores(saved, ids)[0], expected, rtol=1e-5, atol=1e-5)

    adapted = get_peft_model(tiny("Qwen2"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(TrainingError, match="output head"):
        prepare_model(adapted)


def scores_of_plain(model, ids):
    log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1].float(), -1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].detach(), log_p


def test_a_head_that_is_no_linear_layer_is_refused():
    model = tiny("Qwen2")
    model.set_output_embeddings(torch.nn.Bilinear(2, 2, 2))
    with pytest.raises(TrainingError, match="Bilinear"):
        prepare_model(model)


def test_the_scores_come_through_every_hook_and_the_models_output():
    # DeepSpeed and FSDP gather weights in hooks of modules and start the backward pass at the model's output.
    model = tiny("Qwen2")
    prepare_model(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2.0)

    def watch_output(module, args, output):
        output.logits.register_hook(seen.append)

    model.register_forward_hook(watch_output)
    doubled, _ = scores(model, [1, 5, 9])
    expected, _ = scores_of_plain(tiny("Qwen2"), [1, 5, 9])
    torch.testing.assert_close(doubled, 2.0 * expected, rtol=1e-5, atol=1e-5)
    doubled.sum().backward()
    assert len(seen) == 1
    assert model.lm_head.task is None


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_reserved_tokens_have_no_part_in_the_distribution(softcap):
    """Log-probs, entropies and gradients are those of a head without the reserved rows."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(size, 8, generator=generator, dtype=torch.float64) for size in (7, 30))
    targets = torch.tensor([0, 1, 9, 22, 29, 5, 20])
    kept = torch.tensor([*range(10), *range(20, 30)])
    outcomes = []
    for rows, reserved, wanted in (
        (weight, slice(10, 20), targets),
        (weight[kept], None, torch.where(targets < 10, targets, targets - 10)),
    ):
        leaves = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
        logprobs, entropy = chunked_logprobs(
            *leaves, wanted, temperature=0.7, softcap=softcap, reserved=reserved, chunk_size=3
        )
        (logprobs.sum() + 30 * entropy.square().sum()).backward()
        outcomes.append([logprobs, entropy, *(leaf.grad for leaf in leaves)])
    assert not outcomes[0][3][10:20].any()
    outcomes[0][3] = outcomes[0][3][kept]
    for with_rows, without in zip(*outcomes, strict=True):
        torch.testing.assert_close(with_rows, without)


def test_the_policy_of_a_model_with_forecasts_excludes_them():
    plain, model = tiny("Qwen2"), tiny("Qwen2")
    model.config.zip_rc = Grid(20, OUTCOMES, (0, 4, 8)).to_config()
    assert output_head(model).reserved == slice(20, 24)
    for policy in (plain, model):
        prepare_model(policy)
    ours, _ = scores(model, [1, 5, 9])
    with torch.no_grad():
        logits = plain(torch.tensor([[1, 5, 9]])).logits[0, :-1]
    logits[:, 20:24] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, torch.tensor([[5], [9]]))[:, 0]
    torch.testing.assert_close(ours, expected)
    packing = verify_packing(model, model, choose_packing(model), torch.device("cpu"))
    assert packing.name == "tree"
