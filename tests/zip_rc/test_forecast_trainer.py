"""Claiming a slice, and training it: against plain computations, on a tiny model with tied embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from posttrain.errors import TrainingError
from posttrain.training.batch import PaddedPacking
from posttrain.zip_rc.grid import OUTCOMES, VALUES, Grid, expected_reward, grid_of, labels
from posttrain.zip_rc.head import claim_slice, unused_ids
from posttrain.zip_rc.trainer import ForecastSettings, ForecastTrainer, forecast_row

EDGES = (0, 2, 4, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("zip-rc") / "tiny")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_the_slice_is_of_ids_that_nothing_uses(folder):
    model, tokenizer = load(folder)
    first = max(tokenizer.get_vocab().values()) + 1
    assert unused_ids(model.config, tokenizer) == range(first, 256)
    grid = claim_slice(model, tokenizer, VALUES, EDGES)
    assert grid == Grid(first, VALUES, EDGES)
    assert grid_of(model.config) == grid
    assert not model.lm_head.weight[list(grid.ids)].any()
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert claim_slice(model, tokenizer, OUTCOMES, EDGES).ids == grid.ids[:6]  # in place of the other
    model.config.pad_token_id = 200  # where no text has it
    assert unused_ids(model.config, tokenizer).start == 201


def test_the_vocabulary_grows_where_there_are_too_few(folder, tmp_path):
    model, tokenizer = load(folder)
    before = model.lm_head.weight.detach().clone()
    edges = tuple(range(0, 200, 8))
    grid = claim_slice(model, tokenizer, VALUES, edges)
    assert grid.first_id + grid.size == model.config.vocab_size == len(model.lm_head.weight) > 256
    assert torch.equal(model.lm_head.weight[: grid.first_id], before[: grid.first_id])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert grid_of(again.config) == grid
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_tie_that_is_none_is_refused(folder):
    model, tokenizer = load(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(TrainingError, match="set tie_word_embeddings to false"):
        claim_slice(model, tokenizer, VALUES, EDGES)


def make_trainer(folder, tmp_path, *, levels=VALUES, kl=0.0, lite=False, steps=3, **settings):
    """Two rollouts of one prompt and one of another, with labels of rewards 1, 0.3 and 0."""
    torch.manual_seed(0)
    model, tokenizer = load(folder)
    reference, _ = load(folder)
    grid = claim_slice(model, tokenizer, levels, EDGES)
    claim_slice(reference, tokenizer, levels, EDGES)
    sequences = [([5, 6, 7], [9, 10, 11, 12], 1.0), ([5, 6, 7], [9, 10, 8], 0.3), ([8, 9], [4] * 9, 0.0)]
    rows = [forecast_row(p, c, labels(grid, reward, len(c))) for p, c, reward in sequences]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, logging_steps=1, save_strategy="no", report_to="none",
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, remove_unused_columns=False, weight_decay=0.0,
    )  # fmt: skip
    return ForecastTrainer(
        model=model,
        tokenizer=tokenizer,
        arguments=arguments,
        grid=grid,
        rows=rows,
        settings=ForecastSettings(3, settings.pop("micro_batch_tokens", 16), kl, lite=lite, **settings),
        reference=reference if kl else None,
    )


def plain_losses(trainer, reference):
    """Mean cross-entropy and KL over all positions, one sequence at a time."""
    cells = list(trainer.grid.ids)
    entropies, divergences = [], []
    for row in trainer.rows:
        places = torch.tensor(row.positions - 1)
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            logits, expected = (model(ids).logits[0, places] for model in (trainer.model, reference))
        targets = torch.tensor(row.cells)
        entropies.append(torch.nn.functional.cross_entropy(logits[:, cells], targets, reduction="none"))
        for tensor in (logits, expected):
            tensor[:, cells] = -1e9
        log_q, log_p = expected.log_softmax(-1), logits.log_softmax(-1)
        divergences.append((log_q.exp() * (log_q - log_p)).sum(-1))
    return torch.cat(entropies).mean().item(), torch.cat(divergences).mean().item()


@pytest.mark.parametrize("micro_batch_tokens", [6, 1000])
def test_the_loss_is_the_plain_one_however_the_batch_is_cut(folder, tmp_path, micro_batch_tokens):
    trainer = make_trainer(folder, tmp_path, kl=2.0, micro_batch_tokens=micro_batch_tokens)
    trainer.train()
    cross_entropy, kl = plain_losses(trainer, trainer.reference)
    assert kl > 1e-4  # three steps at a large learning rate have moved the policy
    loss = trainer.training_step(trainer.model, {"step": 3}).item()
    assert trainer._means["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-5)
    assert trainer._means["kl"] == pytest.approx(kl, abs=1e-5)
    assert loss == pytest.approx(cross_entropy + 2.0 * kl, abs=1e-4)
    first = trainer.state.log_history[0]
    assert first["cross_entropy"] == pytest.approx(np.log(21), abs=1e-5)  # rows of zeros: all cells alike
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert cross_entropy < first["cross_entropy"]


def test_lite_leaves_everything_but_the_slice_bit_identical(folder, tmp_path):
    before, _ = load(folder)
    trainer = make_trainer(folder, tmp_path, lite=True)
    trainer.train()
    after = trainer.model.state_dict()
    reserved = list(trainer.grid.ids)
    for name, weight in before.state_dict().items():
        changed = after[name].clone()
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert changed[reserved].any()
            changed[reserved] = weight[reserved]
        assert torch.equal(changed, weight), name
    entropies = [line["cross_entropy"] for line in trainer.state.log_history if "loss" in line]
    assert entropies[0] > entropies[-1]
    ids = torch.tensor([[5, 6, 7, 9]])
    kept = [token for token in range(256) if token not in reserved]
    assert torch.equal(trainer.model(ids).logits[..., kept], before(ids).logits[..., kept])


def test_values_are_means_over_the_listed_positions(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, levels=OUTCOMES, steps=2)
    trainer.train()
    rows = [forecast_row(row.token_ids[:3], row.token_ids[3:]) for row in trainer.rows]
    for row in rows:
        row.positions = row.positions[-2:]
    values = trainer.expected_rewards(rows)
    for row, value in zip(rows, values, strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([row.token_ids])).logits[0, row.positions - 1]
        joint = trainer.grid.joint(logits[:, list(trainer.grid.ids)].numpy())
        assert value == pytest.approx(expected_reward(trainer.grid, joint).mean(), abs=1e-5)
    assert len(set(values)) == 3


def test_every_epoch_has_every_rollout_in_an_order_of_its_own(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    orders = [[trainer.rows.index(row) for row in trainer.batch(step)] for step in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [trainer.rows.index(row) for row in trainer.batch(4)] == orders[4]


def test_labels_and_places_agree(folder, tmp_path):
    """The position that predicts the last token of a rollout is the one with nothing left."""
    row = make_trainer(folder, tmp_path).rows[0]
    micro = PaddedPacking().collate([row], torch.device("cpu"))
    assert micro.places[micro.prediction].tolist() == [2, 3, 4, 5]
    assert micro.targets.tolist() == [9, 10, 11, 12]
    assert (row.cells - 18).tolist() == [1, 1, 0, 0]  # 3, 2, 1 and 0 tokens left, in bins of 2
