from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from posttrain.recipe.schema import LossConfig
from posttrain.training import tree as module
from posttrain.training.batch import PaddedPacking, PaddingFreePacking, TrainRow, empty_row
from posttrain.training.buffer import UpdateBatch
from posttrain.training.forward import choose_packing, policy_logprobs, prepare_model, verify_packing
from posttrain.training.losses import Denominators
from posttrain.training.objective import objective
from posttrain.training.tree import Piece, Tree, TreePacking, partition

CPU = torch.device("cpu")
VOCAB = 50


# --- layout ------------------------------------------------------------------------------------------------


def test_worked_example():
    #            5 6 ─┬─ 7 8          packed row   5 6 7 8 9
    #                 └─ 9            places       0 1 2 3 4      positions 0 1 2 3 2
    tree = Tree([(5, 6, 9), (5, 6, 7, 8)])
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 4], [0, 1, 2, 3]]


def test_worked_example_of_shared_predictions():
    # Both rows predict 6 after 5, which is one prediction; after "5 6" one predicts 7 and the other 9.
    rows = [TrainRow((5, 6, 9), np.array([1, 2])), TrainRow((5, 6, 7, 8), np.array([1, 2, 3]))]
    micro = TreePacking().collate(rows, CPU)
    assert micro.inputs["input_ids"].tolist() == [[5, 6, 7]]  # nothing follows 8 or 9
    assert micro.targets.tolist() == [6, 9, 6, 7, 8]
    assert micro.row.tolist() == [0, 0, 1, 1, 1]
    assert list(zip(micro.places.tolist(), micro.place_targets.tolist(), strict=True)) == [
        (0, 6),
        (1, 7),
        (1, 9),
        (2, 8),
    ]
    assert micro.prediction.tolist() == [0, 2, 0, 1, 3]


def random_sequences(rng, vocab=VOCAB, roots=2, depth=4, longest=9):
    """Sequences of a random forest: ragged, forked up to `depth` times, some of them twice."""
    sequences = []

    def grow(prefix, level):
        here = prefix + rng.integers(vocab, size=rng.integers(1, longest)).tolist()
        forks = 0 if level == depth else rng.integers(0, 4)
        if forks == 0 or rng.random() < 0.3:
            sequences.extend([tuple(here)] * (2 if rng.random() < 0.2 else 1))
        for _ in range(forks):
            grow(here[: rng.integers(1, len(here) + 1)], level + 1)

    for _ in range(roots):
        grow([], 0)
    return [sequences[index] for index in rng.permutation(len(sequences))]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    window=st.one_of(st.none(), st.integers(1, 12)),
    call_cost=st.sampled_from([0, 20, 1_000_000]),
    piece=st.sampled_from([1, 5, 512]),
)
def test_every_token_sees_its_path_and_nothing_else(seed, window, call_cost, piece):
    sequences = random_sequences(np.random.default_rng(seed), vocab=3)
    tree = Tree(sequences)
    expected = set()
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == list(sequence)
        assert tree.positions[path].tolist() == list(range(len(path)))
        for index, place in enumerate(path):
            low = 0 if window is None else max(0, index - window + 1)
            expected |= {(int(place), int(key)) for key in path[low : index + 1]}
    assert len(tree.tokens) == len({sequence[:end] for sequence in sequences for end in range(1, 99)} - {()})

    original, module.PIECE = module.PIECE, piece
    try:
        blocks = partition(tree._pieces, window, call_cost)
    finally:
        module.PIECE = original
    seen, queries = set(), []
    for block in blocks:
        keys = np.concatenate([np.arange(*run) for run in block.key_runs()])
        mask = block.mask(window)
        assert mask.shape == (block.queries, len(keys))
        if block.is_chain:
            assert (mask == module.band_mask(block.queries, len(keys), window)).all()
        queries += range(block.first, block.first + block.queries)
        seen |= {(block.first + q, int(keys[k])) for q, k in zip(*np.nonzero(mask), strict=True)}
    assert seen == expected
    assert queries == list(range(len(tree.tokens)))


def test_blocks_follow_the_cost():
    path = np.arange(100)
    branches = [Piece(np.concatenate([path, [100 + 2 * i, 101 + 2 * i]]), 100, 102) for i in range(3)]
    pieces = [Piece(path, 0, 100), *branches]
    # Apart: 3 · 2 · 102 pairs and three calls. Together: 6 · 106 pairs and one call. The root is apart.
    assert [len(block.pieces) for block in partition(pieces, None, 100)] == [1, 3]
    assert [len(block.pieces) for block in partition(pieces, None, 0)] == [1, 1, 1, 1]


# --- equality with the plain computation -------------------------------------------------------------------

KINDS = {
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "Gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 6},
}


def make_model(kind, seed=0, **options):
    torch.manual_seed(seed)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **KINDS.get(kind, {}) | options,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def make_rows(rng):
    """Rows of a random forest with two channels, a supervised term, tool masks and nothing to train."""
    rows = []
    for sequence in random_sequences(rng):
        kept = np.flatnonzero(rng.random(len(sequence)) < 0.7)
        positions = kept[kept > 0] if rng.random() < 0.85 else np.zeros(0, dtype=np.int64)
        row = TrainRow(sequence, positions)
        if rng.random() < 0.2:
            row.nll_weights["text"] = rng.random(len(positions))
        else:
            row.advantages["outcome"] = rng.normal(size=len(positions))
            if rng.random() < 0.5:
                row.advantages["meta"] = rng.normal(size=len(positions))
            row.sampling_logprobs = rng.normal(-3, 0.1, len(positions))
            row.reference_logprobs = rng.normal(-3, 0.1, len(positions))
        rows.append(row)
    return rows


LOSS = LossConfig(kind="grpo", kl=0.1, entropy=0.05)


def loss_of(micro, logprobs, entropy):
    names = ("outcome", "meta", "text")
    batch = UpdateBatch(
        0,
        0,
        False,
        [micro.rows],
        {"outcome": 1.0, "meta": 0.5},
        {"text": 0.3},
        {name: Denominators(len(micro.rows), 40.0, 32) for name in names},
    )
    return objective(batch, micro, logprobs, entropy, loss=LOSS, several_updates=False)[0]


def gradients(model):
    taken = {
        name.replace("base_model.model.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return taken


def plain(model, micro, temperature):
    """Loss and gradients from each row's own logits, without anything of ours."""
    logprobs, entropies = [], []
    for row in micro.rows:
        logits = model(input_ids=torch.tensor([row.token_ids])).logits[0].float() / temperature
        log_p = torch.log_softmax(logits, -1)[torch.from_numpy(row.positions - 1)]
        targets = torch.tensor(row.token_ids)[torch.from_numpy(row.positions)]
        logprobs.append(log_p.gather(1, targets[:, None]).squeeze(1))
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    loss = loss_of(micro, torch.cat(logprobs), torch.cat(entropies))
    loss.backward()
    return loss.item(), gradients(model)


def ours(model, packing, rows, temperature):
    micro = packing.collate(rows, CPU)
    loss = loss_of(micro, *policy_logprobs(model, model, micro, temperature=temperature, train_entropy=True))
    loss.backward()
    return loss.item(), gradients(model)


def assert_equal(actual, expected, tolerance=5e-4):
    assert actual[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert actual[1].keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() <= tolerance * scale, name


def both(kind, **options):
    """A model as transformers makes it, attention in plain Python, and a copy of it made ready for trees."""
    model = make_model(kind, **options)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    prepare_model(model)
    return model, reference


@pytest.mark.parametrize("kind", KINDS)
def test_equals_rows_on_their_own(kind, monkeypatch):
    model, reference = both(kind)
    packing = choose_packing(model)
    assert packing.name == "tree"
    for seed, (call_cost, piece) in enumerate([(1000, 512), (0, 3)]):
        monkeypatch.setitem(module.CALL_COST, "cpu", call_cost)
        monkeypatch.setattr(module, "PIECE", piece)
        rows = make_rows(np.random.default_rng([seed, len(kind)]))
        actual = ours(model, packing, rows, temperature=0.8)
        expected = plain(reference, packing.collate(rows, CPU), temperature=0.8)
        assert_equal(actual, expected)
        assert_equal(ours(model, PaddedPacking(), rows, temperature=0.8), expected)


def test_lora():
    torch.manual_seed(0)
    model = get_peft_model(make_model("Qwen3"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    reference = copy.deepcopy(model)
    prepare_model(model)
    packing = choose_packing(model)
    rows = make_rows(np.random.default_rng(3))
    expected = plain(reference, packing.collate(rows, CPU), 1.0)
    assert all("lora_" in name for name in expected[1])
    assert_equal(ours(model, packing, rows, 1.0), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, monkeypatch):
    model, reference = both("Gemma3")
    calls = []
    monkeypatch.setattr(module, "_attend", lambda *args, f=module._attend: calls.append(1) or f(*args))
    rows = make_rows(np.random.default_rng(4))
    packing = TreePacking()
    expected = ours(model, packing, rows, 1.0)
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_equal(ours(model, packing, rows, 1.0), expected, 1e-5)
    assert len(calls) == 3 * once  # once before, and twice with recomputation
    assert_equal(expected, plain(reference, packing.collate(rows, CPU), 1.0))


def test_bfloat16_autocast():
    model, reference = both("Qwen2")
    rows = make_rows(np.random.default_rng(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ours(model, TreePacking(), rows, 1.0)
    expected = plain(reference, TreePacking().collate(rows, CPU), 1.0)
    assert actual[0] == pytest.approx(expected[0], rel=0.05, abs=0.02)
    one, other = (torch.cat([g.flatten() for g in result[1].values()]) for result in (actual, expected))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99
    # A tree that let branches see each other would be no closer than this.
    assert abs(ours(model, TreePacking(), rows, 1.0)[0] - expected[0]) < 1e-4


def test_padding_free_rows_equal_rows_on_their_own():
    # transformers makes a mask from position ids for "sdpa" as it makes sequence bounds for flash attention.
    model, reference = both("Qwen3")
    rows = make_rows(np.random.default_rng(6))
    packing = PaddingFreePacking()
    micro = packing.collate(rows, CPU)
    assert micro.inputs["position_ids"].shape == (1, sum(len(row.context) for row in rows))
    assert_equal(ours(model, packing, rows, 1.0), plain(reference, micro, 1.0))


def test_every_distinct_token_is_computed_once():
    model, _ = both("Llama")
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    rows = [
        TrainRow((*range(20), *end), np.arange(20, 20 + len(end)))
        for end in ((1, 2, 3), (1, 2, 4, 5), (7,), (1, 2, 3))
    ]
    policy_logprobs(model, model, TreePacking().collate(rows, CPU), temperature=1.0)
    policy_logprobs(model, model, PaddedPacking().collate(rows, CPU), temperature=1.0)
    hook.remove()
    assert seen == [20 + 3, 4 * 23]  # the prompt, "1 2" and "4", whose sibling "3" predicts nothing


def test_a_batch_without_trained_tokens_reaches_every_weight():
    model, _ = both("Qwen2", tie_word_embeddings=False)
    for packing in (TreePacking(), PaddedPacking(), PaddingFreePacking()):
        logprobs, entropy = policy_logprobs(
            model, model, packing.collate([empty_row()], CPU), temperature=1.0
        )
        assert logprobs.shape == entropy.shape == (0,)
        (0.0 * logprobs.sum()).backward()
        assert all((parameter.grad == 0).all() for parameter in model.parameters())
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_generation_is_not_changed(kind):
    model = make_model(kind).eval()
    prompt = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(prompt, attention_mask=mask, **options)
    prepare_model(model)
    actual = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(actual.logits, expected.logits, strict=True))


# --- which packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
            ),
            "attention cannot be replaced",
        ),
        (lambda: make_model("Qwen2", attn_implementation="eager"), "attention implementation eager"),
    ],
    ids=["state space", "eager"],
)
def test_other_models_train_on_padded_rows_and_say_so(make, reason, caplog):
    model = make()
    reference = copy.deepcopy(model)
    prepare_model(model)
    with caplog.at_level(logging.WARNING):
        packing = choose_packing(model)
        assert verify_packing(model, model, packing, CPU) is packing
    assert packing.name == "padded"
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("posttrain")]
    assert reason in line
    assert type(model).__name__ in line
    rows = make_rows(np.random.default_rng(7))
    assert_equal(ours(model, packing, rows, 1.0), plain(reference, packing.collate(rows, CPU), 1.0))


def test_flash_attention_takes_padding_free_rows(caplog, monkeypatch):
    model = make_model("Qwen2")
    monkeypatch.setattr("posttrain.training.tree.attention_of", lambda model: "flash_attention_2")
    monkeypatch.setattr("posttrain.training.forward.attention_of", lambda model: "flash_attention_2")
    with caplog.at_level(logging.WARNING):
        assert choose_packing(model).name == "padding-free"
    assert "flash_attention_2" in caplog.text


def test_a_tree_that_changes_the_log_probs_is_not_used(caplog, monkeypatch):
    model, _ = both("Qwen2")
    packing = choose_packing(model)
    model.train()
    assert verify_packing(model, model, packing, CPU) is packing
    assert all(part.training for part in model.modules())
    full = module.Block.mask
    monkeypatch.setattr(module.Block, "mask", lambda block, window: np.ones_like(full(block, window)))
    with caplog.at_level(logging.WARNING):
        assert verify_packing(model, model, packing, CPU).name == "padded"
    assert "log-probs there differ" in caplog.text


def test_a_window_that_attention_is_not_told_of(caplog):
    # Qwen2-MoE puts its window into the mask only; on the short sequences of the check nothing differs.
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=1, use_sliding_window=True, sliding_window=64, max_window_layers=1,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config)
    prepare_model(model)
    packing = choose_packing(model)
    with caplog.at_level(logging.WARNING):
        verified = verify_packing(model, model, packing, CPU)
    assert verified.name == "padded"
    assert "sliding windows" in caplog.text


# --- micro-batches -----------------------------------------------------------------------------------------


def group(prompt, ends):
    return [TrainRow((*prompt, *end), np.arange(len(prompt), len(prompt) + len(end))) for end in ends]


def test_micro_batches_of_a_tree_end_between_groups():
    one = group(range(20, 30), [(1, 1, 0), (2, 2, 0), (3, 3, 0)])  # 10 + 3·2 tokens
    two = group(range(30, 40), [(1, 1, 0), (2, 2, 0), (3, 3, 0)])
    mixed = [two[1], one[2], one[0], two[0], two[2], one[1]]
    batches = TreePacking().split(mixed, 20)  # the fourth row's prompt would not fit
    assert [len(batch) for batch in batches] == [3, 3]
    assert {id(row) for row in batches[0]} == {id(row) for row in one}
    assert [len(batch) for batch in TreePacking().split(mixed, 28)] == [
        3,
        3,
    ]  # it fits, and is not torn off
    assert [len(batch) for batch in TreePacking().split(mixed, 32)] == [6]
    assert [len(batch) for batch in TreePacking().split(mixed, 1)] == [1] * 6


@pytest.mark.parametrize("packing", [TreePacking(), PaddedPacking(), PaddingFreePacking()])
def test_micro_batches_keep_every_row_and_the_budget(packing):
    rows = make_rows(np.random.default_rng(8)) + make_rows(np.random.default_rng(9))
    for budget in (10, 40, 1000):
        batches = packing.split(rows, budget)
        assert sorted(id(row) for batch in batches for row in batch) == sorted(id(row) for row in rows)
        for batch in batches:
            tokens = packing.collate(batch, CPU).inputs["input_ids"].numel()
            assert tokens <= budget or len(batch) == 1
