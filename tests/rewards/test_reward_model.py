"""Reward models: what they score, against transformers alone; what they refuse; which files they are."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import make_tokenizer
from rewards.tiny_reward_model import make_reward_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from posttrain.errors import RewardError
from posttrain.recipe.schema import RewardModelConfig
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.model import RewardModel, cut

PAIRS = [(f"What is {n} + {n}?", "It is " + "so " * (n * 7 % 23) + str(2 * n)) for n in range(24)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by kind, made on first use."""
    made = {}
    kinds = {
        "scalar": {},
        "plain": {"chat": False},
        "unpadded": {"pad": False},
        "llama": {"pad": False, "chat": False, "family": "Llama"},
        "three": {"labels": 3},
        "steps": {"head": "TokenClassification", "labels": 2},
        "causal": {"head": "CausalLM"},
    }

    def folder(kind):
        if kind not in made:
            made[kind] = make_reward_model(tmp_path_factory.mktemp(kind), **kinds[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def load(folders):
    def loaded(kind, **settings):
        return RewardModel(RewardModelConfig(path=str(folders(kind)), **settings))

    return loaded


def text_ids(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def reference(folder, ids, kind=AutoModelForSequenceClassification):
    """Logits of one text, by transformers."""
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).logits[0]


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalar", "unpadded", "llama", "steps"])
def test_a_batch_gives_what_each_text_gives(load, kind):
    label = {"label": 1, "step_separator": " "} if kind == "steps" else {}
    model = load(kind, batch_tokens=900, **label)
    together = model.score(PAIRS)
    alone = [model.score([pair])[0] for pair in PAIRS]
    assert [score.error for score in together] == [""] * len(PAIRS)
    assert [score.value for score in together] == pytest.approx([s.value for s in alone], abs=1e-5)
    assert [score.tokens for score in together] == [score.tokens for score in alone]
    assert len({round(score.value, 4) for score in together}) > 20


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_a_score_is_that_of_transformers(load, folders, kind):
    values = [score.value for score in load(kind).score(PAIRS[:3])]
    expected = [float(reference(folders(kind), text_ids(prompt + text))[0]) for prompt, text in PAIRS[:3]]
    assert values == pytest.approx(expected, abs=1e-5)


def test_a_text_may_end_in_what_others_would_pad_with(load, folders):
    # Without a padding token in its configuration, a model scores the last token, whichever that is.
    ends = ["yes", "yes<pad>", "yes<pad><pad>", "yes<|im_end|>", "a longer one"]
    values = [score.value for score in load("llama").score([("Well? ", end) for end in ends])]
    expected = [float(reference(folders("llama"), text_ids("Well? " + end))[0]) for end in ends]
    assert values == pytest.approx(expected, abs=1e-5)
    assert len(set(values)) == len(ends)


def test_batches_keep_to_the_budget_and_to_like_lengths():
    lengths = [50, 3, 4, 40, 100, 5, 41]
    batches = cut(lengths, 100)
    assert batches == [[1, 2, 5], [3, 6], [0], [4]]
    assert cut([30, 30, 30, 30], 90) == [[0, 1, 2], [3]]
    assert cut([500], 90) == [[0]]  # longer than the budget, but it has to go somewhere
    assert cut([], 90) == []


def test_too_little_memory_halves_the_batch(load, monkeypatch):
    model = load("scalar")
    expected = [score.value for score in model.score(PAIRS[:8])]
    forward = type(model)._values

    def small(self, batch):
        if len(batch) > 2 or any(len(text.ids) > 300 for text in batch):
            raise torch.OutOfMemoryError("no")
        return forward(self, batch)

    monkeypatch.setattr(type(model), "_values", small)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    scores = model.score([*PAIRS[:8], ("long", "x" * 300)])
    assert [score.value for score in scores[:8]] == pytest.approx(expected, abs=1e-5)
    assert scores[8].value is None
    assert scores[8].error == "the memory does not suffice for it"


# --- texts ------------------------------------------------------------------------------------------------


def test_templates_are_filled_in_one_pass(load):
    model = load("scalar", template="Q: {prompt}\n{x}{}A: {completion}!")
    (text,) = model.encode([("{completion} or {prompt}?", "{prompt} {0} {{")])
    assert list(text.ids) == text_ids("Q: {completion} or {prompt}?\n{x}{}A: {prompt} {0} {{!")
    (text,) = model.encode(
        [([{"role": "system", "content": "Be"}, {"role": "user", "content": "good"}], "ok")]
    )
    assert list(text.ids) == text_ids("Q: Be\ngood\n{x}{}A: ok!")


def test_the_chat_template_is_the_models(load):
    model = load("scalar")
    chat = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    texts = model.encode([("How?", "So."), (system, "So.")])
    assert list(texts[0].ids) == text_ids(chat)
    assert list(texts[1].ids) == text_ids("<|im_start|>system\nBe brief.<|im_end|>\n" + chat)


def test_without_one_the_prompt_goes_before_the_completion(load):
    model = load("plain")
    texts = model.encode([("How? ", "So."), ([{"role": "user", "content": "How?"}], "So.")])
    assert list(texts[0].ids) == text_ids("How? So.")
    assert texts[1] == "the prompt is a list of messages, for which the model has no chat template"


def test_odd_texts_are_scored(load):
    odd = ["", "\ud83d alone", "\x00\u202e", "{" * 200, "a" * 400]
    for kind in ("scalar", "plain"):
        assert all(score.value is not None for score in load(kind).score([("Well?", text) for text in odd]))


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("{prompt}={completion}#", "=", "#"), (None, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")],
)
def test_what_is_too_long_loses_the_beginning_of_its_prompt(load, template, before, after):
    model = load("scalar", template=template, max_length=40)
    prompt = "".join(chr(97 + n % 26) for n in range(100))
    short, long, whole, too_long = model.encode(
        [("hi", "yes"), (prompt, "yes"), (prompt, "y" * (40 - len(text_ids(after)))), (prompt, "y" * 41)]
    )
    assert not short.truncated
    assert long.truncated
    assert len(long.ids) == 40
    assert list(long.ids) == text_ids(prompt + before + "yes" + after)[-40:]
    assert whole.truncated
    assert list(whole.ids) == text_ids("y" * (40 - len(text_ids(after))) + after)
    alone = 41 + len(text_ids(after))
    assert too_long == (
        f"the completion alone has {alone} tokens with what the template puts behind it, and max_length is 40"
    )
    scores = model.score([(prompt, "yes"), (prompt, "y" * 41)])
    assert (scores[0].truncated, scores[0].tokens) == (True, 40)
    assert (scores[1].value, scores[1].error) == (None, too_long)


def test_a_limit_of_the_model_is_kept(load):
    (text,) = load("plain").encode([("x" * 600, "end")])
    assert text.truncated
    assert len(text.ids) == 512


# --- labels and steps -------------------------------------------------------------------------------------


def test_one_of_several_labels_counts(load, folders):
    pair = ("How? ", "So.")
    ids = text_ids("<|im_start|>user\nHow? <|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n")
    logits = reference(folders("three"), ids)
    cases = [
        ({"label": 2}, logits[2]),
        ({"label": "LABEL_1"}, logits[1]),
        ({"label": 0, "activation": "sigmoid"}, logits[0].sigmoid()),
        ({"label": 1, "activation": "softmax"}, logits.softmax(0)[1]),
    ]
    for settings, expected in cases:
        (score,) = load("three", **settings).score([pair])
        assert score.value == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("three", {}, r"has 3 labels, 0 \(LABEL_0\), 1 \(LABEL_1\), 2 \(LABEL_2\): set label"),
        ("three", {"label": 3}, "has no label 3; there are 0"),
        ("three", {"label": "good"}, "has no label 'good'"),
        ("scalar", {"activation": "softmax"}, "whose softmax is always 1"),
        ("scalar", {"device": "cuda:99"}, "cannot be put on cuda:99"),
    ],
)
def test_settings_that_do_not_fit_are_refused(load, kind, settings, message):
    with pytest.raises(RewardError, match=message):
        load(kind, **settings)


def test_steps_are_scored_at_their_last_tokens(load, folders):
    model = load(
        "steps", label=1, step_separator="\n\n", activation="softmax", template="{prompt}:{completion}"
    )
    (text,) = model.encode([("Q", "one\n\ntwo\n\n\n\nthree")])
    whole = "Q:one\n\ntwo\n\n\n\nthree\n\n"
    assert list(text.ids) == text_ids(whole)
    assert text.ends == (6, 11, len(whole) - 1)
    logits = reference(folders("steps"), text.ids, AutoModelForTokenClassification)
    steps = logits.softmax(-1)[list(text.ends), 1].tolist()
    expected = {"min": min(steps), "mean": sum(steps) / 3, "last": steps[2], "product": math.prod(steps)}
    for reduce, value in expected.items():
        settings = {**model.config.model_dump(), "step_reduce": reduce}
        (score,) = RewardModel(RewardModelConfig(**settings)).score([("Q", "one\n\ntwo\n\n\n\nthree")])
        assert score.value == pytest.approx(value, abs=1e-5)


def test_steps_are_found_in_a_chat_and_after_a_cut(load):
    model = load("steps", label=1, max_length=30)
    text, blank = model.encode([("x" * 100, "one\n\ntwo"), ("Q", " \n\n ")])
    assert text.truncated
    characters = make_tokenizer().convert_ids_to_tokens(list(text.ids))
    assert [characters[end] for end in text.ends] == ["Ċ", "Ċ"]
    assert [characters[end - 2] for end in text.ends] == ["e", "o"]
    assert blank == "the completion has no steps"


def test_what_is_not_finite_is_no_score(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(folders("scalar"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].fill_(math.inf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (score,) = RewardModel(RewardModelConfig(path=str(folder))).score([("Q", "A")])
    assert score.value is None
    assert score.error in ("the model gives nan", "the model gives inf", "the model gives -inf")


# --- checkpoints ------------------------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused(load):
    with pytest.raises(RewardError, match="is Qwen2ForCausalLM; a reward model is"):
        load("causal")
    with pytest.raises(RewardError, match=r"has no weights for score.weight, which would be random"):
        load("causal", head="sequence")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(RewardError, match=r"there is no folder ./nowhere, and the hub does not give it"):
        RewardModel(RewardModelConfig(path="./nowhere"))
    with pytest.raises(RewardError, match=r"has no config.json, so it is no model"):
        RewardModel(RewardModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RewardError, match=r"config.json is not a JSON object"):
        RewardModel(RewardModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForSequenceClassification"]}')
    with pytest.raises(RewardError, match="cannot be loaded"):
        RewardModel(RewardModelConfig(path=str(tmp_path)))


def test_the_hash_is_that_of_sha256sum(tmp_path, folders):
    folder = tmp_path / "model"
    shutil.copytree(folders("scalar"), folder)
    (folder / "README.md").write_text("no score depends on it")
    checkpoint = find_checkpoint(RewardModelConfig(path=str(folder)))
    names = [path.name for path in checkpoint.files()]
    assert names == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    printed = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True).stdout
    digest = checkpoint.sha256()
    assert digest == hashlib.sha256(printed).hexdigest()
    stamp = checkpoint.stamp()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert checkpoint.stamp() != stamp
    assert checkpoint.sha256() != digest


def test_files_in_the_hubs_cache_are_known_by_their_name(tmp_path, folders):
    known = "ab" * 32
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    blobs.mkdir()
    shutil.copytree(folders("scalar"), snapshot)
    (snapshot / "model.safetensors").rename(blobs / known)
    (snapshot / "model.safetensors").symlink_to(blobs / known)
    lines = []
    for path in find_checkpoint(RewardModelConfig(path=str(snapshot))).files():
        own = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{known if path.name == 'model.safetensors' else own}  {path.name}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert find_checkpoint(RewardModelConfig(path=str(snapshot))).sha256() == expected


def test_the_version_changes_with_settings_that_scores_depend_on(folders):
    def version(**settings):
        config = RewardModelConfig(path=str(folders("three")), **settings)
        return find_checkpoint(config).version(config)

    assert version().startswith("local+")
    same = [version(), version(batch_tokens=5), version(device="cpu"), version(range=(0, 1))]
    assert len(set(same)) == 1
    other = [{"label": 1}, {"template": "{completion}"}, {"activation": "softmax"}, {"max_length": 9}]
    assert len({version(), *(version(**settings) for settings in other)}) == 5


def test_nothing_heavy_is_imported_to_look_at_one(folders):
    code = f"""
import json, sys
from posttrain.recipe.schema import RewardModelConfig, RewardSpec
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.registry import locate
config = RewardModelConfig(path={json.dumps(str(folders("scalar")))})
assert find_checkpoint(config).head() == "sequence"
assert locate(RewardSpec(name="rm"), {{"rm": config}}).args["model"]["path"] == config.path
assert not {{"torch", "transformers", "fastapi", "uvicorn", "aiohttp", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
