"""The slice of the vocabulary that forecasts live in: found or added, and read in the model's forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.errors import TrainingError
from posttrain.training.logprobs import OutputHead, output_head
from posttrain.zip_rc.grid import CONFIG_KEY, Grid
from posttrain.zip_rc.loss import States, chunked_kl, slice_logits


def unused_ids(config: Any, tokenizer: Any) -> range:
    """The token ids of a model above all that a text or the model's configuration can name; maybe none."""
    used = {*tokenizer.get_vocab().values(), *tokenizer.all_special_ids}
    for settings in (config, config.get_text_config()):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(settings, name, None)
            used |= {token for token in (value if isinstance(value, list) else [value]) if token is not None}
    first = max(used) + 1
    return range(first, max(first, config.get_text_config().vocab_size))


def claim_slice(
    model: Any, tokenizer: Any, reward_values: Sequence[float], length_edges: Sequence[int]
) -> Grid:
    """Reserve ids for a grid in `model`, with rows of zeros, so that every cell is as likely as the others.

    The ids are the first that nothing uses, in place of the grid that the model may have. If there are too
    few, the vocabulary grows. The grid is written into the model's configuration, and with it into
    checkpoints.

    Rows of a tied matrix are input embeddings as well. That is safe here: no text has these ids, and no
    engine samples them.

    Args:
        model: a `PreTrainedModel`, not yet wrapped by a launcher.
        tokenizer: its own.
        reward_values: of the grid.
        length_edges: of the grid.

    Raises:
        TrainingError: the configuration ties the embeddings to the head, but they are two matrices.
        DataError: there is no such grid.
    """
    first = unused_ids(model.config, tokenizer).start
    grid = Grid(first, tuple(reward_values), tuple(length_edges))
    _check_tie(model)
    rows = min(output_head(model).weight.shape[0], model.config.get_text_config().vocab_size)
    if (needed := grid.first_id + grid.size) > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    setattr(model.config, CONFIG_KEY, grid.to_config())
    head = output_head(model)
    with torch.no_grad():
        head.weight[head.reserved] = 0.0
        if head.bias is not None:
            head.bias[head.reserved] = 0.0
    return grid


def _check_tie(model: Any) -> None:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if tied and head.weight is not embeddings.weight:
        raise TrainingError(
            f"{type(model).__name__} ties its head to the embeddings by its configuration, but they are two "
            "matrices: a checkpoint would keep one of them, without the forecasts; set tie_word_embeddings "
            "to false in its config.json"
        )


def freeze_all_but_head(model: Any) -> None:
    """Let nothing but the output head get gradients, also where it is tied to the embeddings."""
    model.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    # Else the head's gradient would come through the embeddings and the whole body, too.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.detach())


@dataclass
class HiddenTask:
    """The hidden states [N, H] themselves; see `HeadTask`."""

    places: torch.Tensor
    dtype: torch.dtype | None = None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `HeadTask`."""
        return hidden


@dataclass
class ForecastTask:
    """Logits of the slice and, last, the KL from a reference: [N, C + 1]; see `HeadTask`.

    Attributes:
        places: which hidden states.
        settings: of the policy's head; its parameters are taken as the forward finds them.
        reference: at the same places; None for a KL of 0.
        top: see `chunked_kl`.
        dtype: set by the head.
    """

    places: torch.Tensor
    settings: OutputHead
    reference: States | None = None
    top: int | None = None
    dtype: torch.dtype | None = None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `HeadTask`."""
        head = replace(self.settings, weight=weight, bias=bias)
        logits = slice_logits(hidden, head)
        if self.reference is None:
            kl = logits.new_zeros(len(logits))
        else:
            kl = chunked_kl(hidden, head, self.reference, top=self.top)
        return torch.cat([logits, kl[:, None].to(logits.dtype)], dim=1)
