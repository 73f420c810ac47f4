import numpy as np
import pytest
import torch

from posttrain.rollout.sampling import RowSampler, draw, truncate_logits
from posttrain.rollout.types import Sampling

CPU = torch.device("cpu")


def test_draw_is_the_inverse_cdf() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens = draw(probs.log().expand(6, -1), uniforms)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_never_chooses_a_token_of_probability_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(2000, 50, generator=generator)
    logits[torch.rand(2000, 50, generator=generator) < 0.7] = -torch.inf
    logits[:, 7] = 0.0
    logprobs = logits.log_softmax(-1)
    for uniform in (0.0, 1 - 2**-53):
        tokens = draw(logprobs, torch.full((2000,), uniform, dtype=torch.float64))
        assert (logprobs.gather(-1, tokens[:, None]) > -40).all()


def test_draw_frequencies() -> None:
    logprobs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(100_000, -1)
    uniforms = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logprobs, uniforms), minlength=4) / 100_000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.39, [3]),  # the best token alone reaches it
        (0, 0.41, [1, 3]),
        (0, 0.75, [1, 2, 3]),
        (0, 1e-9, [3]),
        # Of the two best, renormalised to 3/7 and 4/7, the best alone reaches 0.55.
        (2, 0.55, [3]),
    ],
)
def test_truncation(top_k: int, top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    truncated = truncate_logits(logits, torch.tensor([top_k]), torch.tensor([top_p]))
    assert truncated.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(truncated[truncated.isfinite()], logits[0, kept])


def test_rows_are_independent_of_each_other() -> None:
    """Seed and index alone decide a row's draws: beside other rows, after rows left, over many blocks."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    samplings = [
        Sampling(1, seed=3),
        Sampling(1, seed=4, temperature=0.5),
        Sampling(1, seed=4, temperature=0),
    ]
    alone = RowSampler([samplings[1]], [2], CPU)
    expected = [alone(logits)[0].item() for _ in range(200)]
    together = RowSampler(samplings, [0, 2, 1], CPU)
    found = [together(logits.expand(3, -1))[0][1].item() for _ in range(70)]
    together.select(torch.tensor([1, 2]), [1, 2])
    found += [together(logits.expand(2, -1))[0][0].item() for _ in range(130)]
    assert found == expected
    assert len(set(found)) > 10


def test_streams_are_stable() -> None:
    """A change here would make every seeded run of the past irreproducible."""
    sampler = RowSampler([Sampling(1, seed=0), Sampling(1, seed=0)], [0, 1], CPU)
    uniform_logits = torch.zeros(2, 1000)
    drawn = np.stack([sampler(uniform_logits)[0].numpy() for _ in range(4)])
    assert drawn.tolist() == [[503, 740], [49, 871], [239, 292], [199, 484]]


def test_large_vocabularies_are_drawn_in_slices() -> None:
    vocab_size = 2**22
    logits = torch.full((6, vocab_size), -torch.inf)
    logits[torch.arange(6), torch.arange(6) * 1000] = 0.0
    sampler = RowSampler([Sampling(1, seed=s) for s in range(6)], [0] * 6, CPU)
    tokens, logprobs = sampler(logits)
    assert tokens.tolist() == [0, 1000, 2000, 3000, 4000, 5000]
    assert logprobs.tolist() == [0.0] * 6


def test_banned_tokens_are_as_if_they_were_not_there() -> None:
    """Rows may ban different tokens; top-k counts the others only, and log-probs are of what is left."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    samplings = [
        Sampling(1, banned_ids=(0, 2)),
        Sampling(1, banned_ids=(0,), temperature=0),
        Sampling(1, top_k=1),
    ]
    sampler = RowSampler(samplings, [0, 0, 0], CPU, reserved=(1,))
    tokens, logprobs = sampler(logits.clone())
    assert tokens.tolist() == [3, 2, 0]
    left = torch.tensor([2.0, 1.0]).log_softmax(0)[0].item()
    assert logprobs.tolist() == pytest.approx([0.0, left, 0.0])
    sampler.select(torch.tensor([2, 0]), [2, 0])
    drawn = {tuple(sampler(logits[:2].clone())[0].tolist()) for _ in range(100)}
    assert drawn == {(0, 3)}


def test_a_row_without_bans_keeps_its_logits_beside_one_with_many() -> None:
    samplings = [Sampling(1), Sampling(1, banned_ids=(0, 1, 2))]
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).repeat(2, 1)
    _, logprobs = RowSampler(samplings, [0, 0], CPU)(logits)
    assert logits[0].tolist() == [1.0, 0.0, -1.0, 2.0]
    assert logits[1].tolist() == [-torch.inf] * 3 + [2.0]
    assert logprobs[1] == 0.0
