"""The same batch gives TRL 1.16's loss, gradients and advantages.

TRL's own code runs from the sampled tokens on: rewards, advantages, old and reference log-probs, importance
ratios (`_generate_and_score_completions`) and the loss (`_compute_loss`); only generation is replaced by
fixed completions. Our side sees unpadded sequences and cuts the batch into micro-batches.
The loss of centred advantages nearly cancels, which would leave little for a relative comparison; so the
losses are compared on advantages that do not, and the advantages by themselves.
`pytest -s` prints the relative differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import make_tiny_model

from posttrain.recipe.schema import LossConfig
from posttrain.training.advantages import compute_advantages
from posttrain.training.logprobs import chunked_logprobs, output_head
from posttrain.training.losses import Denominators, merge_stats, policy_loss

TEMPERATURE = 0.8
MAX_TOKENS = 16
CAP = 1.15
PROMPT_IDS = [[5, 9, 17], [40, 41, 42, 43, 60, 7, 12], [70]]
PROMPTS = [f"prompt {i}" for i in range(3) for _ in range(3)]
REWARDS = [1.0, 0.0, 0.3, 2.0, -1.5, 0.25, 1.0, 1.0, 0.0]
ADVANTAGES = [1.0, -0.4, 0.7, 1.5, -0.8, 0.5, 1.2, 0.9, 0.3]
LENGTHS = [4, 16, 1, 9, 2, 7, 12, 3, 5]
MICRO_BATCHES = [[7, 1], [0, 2, 3, 8], [4], [6, 5]]
TABLE: list[str] = []


def make_batch():
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in LENGTHS]
    tool_mask = [[int(t % 4 != 2) for t in range(n)] for n in LENGTHS]
    noise = [(0.15 * torch.randn(n, generator=generator)).tolist() for n in LENGTHS]
    return [PROMPT_IDS[i // 3] for i in range(9)], completions, tool_mask, noise


PROMPT_ROWS, COMPLETIONS, TOOL_MASK, NOISE = make_batch()


def perturb(model, seed, size=0.01):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def fixed_reward(prompts, completions, **columns):
    return REWARDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("parity"))


def build(trainer_class, config_class, checkpoint, tmp_path, **options):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = config_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(LENGTHS),
        num_generations=3,
        gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        temperature=TEMPERATURE,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    trainer = trainer_class(
        model=str(checkpoint),
        reward_funcs=fixed_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.current_gradient_accumulation_steps = 1
    perturb(trainer.model, seed=1)
    trainer.start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.frozen_reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def grpo(checkpoint, tmp_path_factory):
    from trl import GRPOConfig, GRPOTrainer

    # With beta the trainer loads a reference model; the cases then set the weight they want.
    yield build(GRPOTrainer, GRPOConfig, checkpoint, tmp_path_factory.mktemp("grpo"), beta=0.1)
    print("\n" + "\n".join(["loss      case                          loss diff  gradient diff", *TABLE]))


@pytest.fixture(scope="module")
def rloo(checkpoint, tmp_path_factory):
    from trl import RLOOConfig, RLOOTrainer

    return build(RLOOTrainer, RLOOConfig, checkpoint, tmp_path_factory.mktemp("rloo"), beta=0.0)


@dataclass
class Case:
    """One configuration: ours, and what differs in the batch."""

    name: str
    options: dict = field(default_factory=dict)
    several_updates: bool = True
    importance: str | None = None
    tool_mask: bool = False


CASES = [
    Case("first update", several_updates=False),
    Case("several updates"),
    Case("clip higher", {"clip_low": 0.1, "clip_high": 0.28}),
    Case("kl", {"kl": 0.3}),
    Case("entropy bonus", {"entropy": 0.05}),
    *(
        Case(mode, importance=mode)
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    Case("tool mask", tool_mask=True),
    Case("all at once", {"kl": 0.3, "entropy": 0.05, "clip_high": 0.3}, True, "token_truncate", True),
]


def configuration(kind, case):
    importance = {"mode": case.importance or "none", "cap": CAP}
    return LossConfig(kind=kind, importance=importance, **case.options)


def sequence_outputs(model, row, tool_mask):
    """Log-probs and entropies of the trained tokens of one unpadded sequence."""
    ids = torch.tensor([PROMPT_ROWS[row] + COMPLETIONS[row]])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, len(PROMPT_ROWS[row]) - 1 : -1]
    targets = torch.tensor(COMPLETIONS[row])
    if tool_mask:
        keep = torch.tensor(TOOL_MASK[row]).bool()
        hidden, targets = hidden[keep], targets[keep]
    head = output_head(model)
    return chunked_logprobs(hidden, head.weight, targets, temperature=TEMPERATURE, chunk_size=5)


def frozen_logprobs(model, tool_mask=False):
    with torch.no_grad():
        return [sequence_outputs(model, row, tool_mask)[0] for row in range(len(LENGTHS))]


def sampled_logprobs(model):
    """What an engine would have reported: the policy's log-probs and some noise, for every token."""
    return [old + torch.tensor(noise) for old, noise in zip(frozen_logprobs(model), NOISE, strict=True)]


def our_loss(config, case, model, old, sampling, reference):
    """Total over the micro-batches, each with its own backward pass; gradients stay in the model."""
    advantages = torch.tensor(ADVANTAGES)
    denominators = Denominators(len(LENGTHS), sum(len(tokens) for tokens in old), MAX_TOKENS)
    total, parts = 0.0, []
    for rows in MICRO_BATCHES:
        outputs = [sequence_outputs(model, row, case.tool_mask) for row in rows]
        lengths = torch.tensor([len(logprobs) for logprobs, _ in outputs])
        sequence = torch.arange(len(rows)).repeat_interleave(lengths)

        def flat(values, rows=rows):
            return None if values is None else torch.cat([values[row] for row in rows])

        loss, stats = policy_loss(
            config,
            logprobs=torch.cat([logprobs for logprobs, _ in outputs]),
            entropy=torch.cat([entropy for _, entropy in outputs]),
            old_logprobs=flat(old) if case.several_updates else None,
            advantages=advantages[rows][sequence],
            sequence=sequence,
            denominators=denominators,
            sampling_logprobs=flat(sampling) if case.importance else None,
            reference_logprobs=flat(reference) if config.kl else None,
        )
        loss.backward()
        total += loss.item()
        parts.append(stats)
    return total, merge_stats(parts)


def gradients(model):
    taken = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return taken


def compare(kind, case, loss, theirs_loss, gradient, theirs_gradient):
    loss_difference = abs(loss - theirs_loss) / abs(theirs_loss)
    gradient_difference = ((gradient - theirs_gradient).norm() / theirs_gradient.norm()).item()
    TABLE.append(f"{kind:9} {case.name:28} {loss_difference:10.1e} {gradient_difference:14.1e}")
    assert theirs_gradient.norm() > 1e-3
    assert loss_difference < 1e-5
    assert gradient_difference < 1e-4


def score(trainer, generated, monkeypatch):
    monkeypatch.setattr(trainer, "_generate", lambda prompts: generated)
    trainer.model.zero_grad()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])


def configure(trainer, config, case):
    trainer.loss_type = "grpo" if config.kind == "gspo" else config.kind
    trainer.importance_sampling_level = "sequence" if config.kind == "gspo" else "token"
    trainer.scale_rewards = "none" if config.kind == "dr_grpo" else "group"
    trainer.beta = config.kl
    trainer.entropy_coef, trainer._entropy_bonus_enabled = config.entropy, bool(config.entropy)
    trainer.epsilon_low, trainer.epsilon_high = config.clip_low, config.clip_high or config.clip_low
    if config.kind == "cispo":  # TRL's value is the cap itself
        trainer.epsilon_high += 1
    trainer.num_iterations = 2 if case.several_updates else 1
    trainer.use_vllm = case.importance is not None
    trainer.vllm_importance_sampling_mode = case.importance
    trainer.vllm_importance_sampling_clip_max = CAP


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"])
def test_grpo_trainer(grpo, monkeypatch, kind, case):
    config, model = configuration(kind, case), grpo.model
    configure(grpo, config, case)
    model.load_state_dict(grpo.start)
    sampling = sampled_logprobs(model)
    tool_mask = TOOL_MASK if case.tool_mask else None
    texts = ["text"] * len(LENGTHS)
    logprobs = [values.tolist() for values in sampling]
    batch = score(grpo, (PROMPT_ROWS, COMPLETIONS, tool_mask, texts, logprobs, {}, None, None), monkeypatch)
    old, reference = (frozen_logprobs(m, case.tool_mask) for m in (model, grpo.frozen_reference))
    if case.tool_mask:
        sampling = [
            values[torch.tensor(mask).bool()] for values, mask in zip(sampling, TOOL_MASK, strict=True)
        ]
    if case.several_updates:
        # A completion's mean log-ratio moves less than its tokens'.
        perturb(model, seed=3, size=0.03 if kind == "gspo" else 0.01)

    theirs = grpo._compute_loss(model, batch | {"advantages": torch.tensor(ADVANTAGES)})
    theirs.backward()
    theirs_gradient = gradients(model)
    loss, stats = our_loss(config, case, model, old, sampling, reference)
    if case.several_updates:
        assert stats["clipped_high"] > 0
        assert stats["clipped_low"] > 0 or kind == "cispo"
    if case.importance:
        assert stats["importance_min"] < 1
        assert stats["importance_max"] == pytest.approx(CAP) or case.importance.endswith("mask")
    compare(kind, case, loss, theirs.item(), gradients(model), theirs_gradient)


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: case.name)
def test_rloo_trainer(rloo, monkeypatch, case):
    config, model = configuration("rloo", case), rloo.model
    rloo.epsilon_low, rloo.epsilon_high = config.clip_low, config.clip_high or config.clip_low
    model.load_state_dict(rloo.start)
    batch = score(rloo, (PROMPT_ROWS, COMPLETIONS, ["text"] * len(LENGTHS)), monkeypatch)
    old = frozen_logprobs(model)
    # Ratios are of whole completions, so a smaller step already takes some out of the clip range.
    perturb(model, seed=4, size=0.003)

    theirs = rloo._compute_loss(model, batch | {"advantages": torch.tensor(ADVANTAGES)})
    theirs.backward()
    theirs_gradient = gradients(model)
    loss, stats = our_loss(config, case, model, old, None, None)
    assert stats["clipped_low"] > 0
    assert stats["clipped_high"] > 0
    compare("rloo", case, loss, theirs.item(), gradients(model), theirs_gradient)
    advantages = compute_advantages("rloo", None, np.array(REWARDS), [i // 3 for i in range(len(LENGTHS))])
    np.testing.assert_allclose(advantages, batch["advantages"].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards", [REWARDS, [0.1, 0.1, 0.1, 5.0, 5.0, -3.0, 0.7, 0.2, 0.9]])
def test_advantages(grpo, monkeypatch, scale, rewards):
    configure(grpo, LossConfig(kind="grpo"), CASES[0])
    grpo.scale_rewards = scale
    monkeypatch.setattr(grpo, "reward_funcs", [lambda prompts, completions, **columns: rewards])
    texts = ["text"] * len(LENGTHS)
    batch = score(grpo, (PROMPT_ROWS, COMPLETIONS, None, texts, None, {}, None, None), monkeypatch)
    advantages = compute_advantages("grpo", scale, np.array(rewards), [i // 3 for i in range(len(LENGTHS))])
    np.testing.assert_allclose(advantages, batch["advantages"].numpy(), rtol=1e-5, atol=1e-4)
