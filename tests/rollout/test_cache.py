import pytest
import torch
from transformers.cache_utils import DynamicLayer

from posttrain.rollout.cache import GrowingLayer


def states(rows: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, new, 4, generator=generator) for _ in range(2))


@pytest.mark.parametrize("prompt", [1, 7, 400])
def test_growing_layer_holds_what_a_dynamic_layer_holds(prompt: int) -> None:
    """Repeating rows, appending far beyond the first room, and dropping rows in any order."""
    growing, dynamic = GrowingLayer(), DynamicLayer()
    selections = {
        0: [0, 0, 0, 1, 1, 2],
        3: [0, 5, 2, 3],
        60: [3, 1, 2],
        65: [0, 1],
        200: [1, 0],
        201: [1],
    }
    rows = 3
    for step in range(210):
        new = states(rows, prompt if step == 0 else 1, seed=step)
        for ours, theirs in zip(growing.update(*new), dynamic.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        if step in selections:
            kept = torch.tensor(selections[step])
            growing.reorder_cache(kept)
            dynamic.reorder_cache(kept)
            rows = len(kept)
            assert torch.equal(growing.keys, dynamic.keys)
        assert growing.get_seq_length() == dynamic.get_seq_length() == prompt + step


def test_forked_rows_hold_their_prefixes_at_the_right_edge() -> None:
    layer = GrowingLayer()
    keys, values = states(2, 9, seed=0)
    layer.update(keys, values)
    layer.fork([1, 0, 1, 0], [0, 4, 0, 4], [9, 3, 0, 5])
    for held, given in ((layer.keys, keys), (layer.values, values)):
        assert held.shape == (4, 2, 9, 4)
        assert torch.equal(held[0], given[1])
        assert torch.equal(held[1, :, 6:], given[0, :, 4:7])
        assert torch.equal(held[3, :, 4:], given[0, :, 4:9])
        assert not held[1, :, :6].any()
        assert not held[2].any()
    new = states(4, 1, seed=1)
    place = layer.keys.data_ptr()
    assert torch.equal(layer.update(*new)[0][:, :, 9:], new[0])
    assert layer.keys.data_ptr() == place


def test_tokens_are_written_in_place() -> None:
    layer = GrowingLayer()
    layer.update(*states(2, 5, seed=0))
    layer.update(*states(2, 1, seed=1))
    place = layer.keys.data_ptr()
    for step in range(20):
        layer.update(*states(2, 1, seed=step))
    layer.reorder_cache(torch.tensor([0]))
    assert layer.keys.data_ptr() == place
