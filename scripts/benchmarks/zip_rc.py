"""Reading a forecast at every token, against the same sampling without: what introspection costs.

Ours bans the 56 ids of a 7 × 8 grid and reads their logits in the pass that predicts each token; theirs is
the same engine, model and requests with neither. Every row has a length of its own, so both sides compute as
many tokens. What was read is checked against a separate forward pass.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.generate import GROUP, PROMPT, PROMPTS, SHAPE, make_requests
from benchmarks.harness import Comparison, Sample, Settings, Stopwatch, alternate, one_thread, require
from benchmarks.models import make_tokenizer, save

from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.tokens import normalised_scores
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion, RolloutRequest
from posttrain.rollout.vllm import VllmEngine
from posttrain.zip_rc.grid import VALUES, Grid

LIMIT = 1.03
GRID = Grid(SHAPE.vocab - 56, VALUES, (0, 8, 16, 24, 32, 48, 64, 96, 128))
CHECKED = 8
"""Rows that are compared with a separate forward pass."""


def compare(settings: Settings) -> list[Comparison]:
    requests = make_requests(settings.seed)
    model = SHAPE.build(settings.seed).eval()
    with one_thread():
        engine = TransformersEngine(model, make_tokenizer(SHAPE.vocab))
        found = [_compare("transformers engine", engine, model, requests, settings)]
        folder = save(SHAPE, settings.seed, Path(tempfile.mkdtemp()))
        served = VllmEngine(str(folder), make_tokenizer(SHAPE.vocab))
        try:
            return [*found, _compare("vllm engine", served, model, requests, settings)]
        finally:
            served.close()


def _compare(
    name: str, engine: RolloutEngine, model: Any, requests: list[RolloutRequest], settings: Settings
) -> Comparison:
    introspective = [
        replace(one, sampling=replace(one.sampling, banned_ids=GRID.ids, scored_ids=GRID.ids))
        for one in requests
    ]
    watch = Stopwatch()

    def run(asked: list[RolloutRequest]) -> Sample[list[Completion]]:
        if isinstance(engine, VllmEngine):
            engine._llm.reset_prefix_cache()  # or the prompts would be computed in the first run alone
        with watch:
            completions = [one for (one,) in engine.generate(asked)]
        return Sample(watch.seconds, completions)

    def check(ours: list[Completion], theirs: list[Completion]) -> None:
        lengths = [request.sampling.max_tokens for request in requests]
        for side in (ours, theirs):
            require([len(one.token_ids) for one in side] == lengths, "numbers of tokens")
        for request, one in list(zip(requests, ours, strict=True))[:CHECKED]:
            require(one.scored is not None and _is_forward(model, request, one), "forecasts")

    values = alternate(lambda: run(introspective), lambda: run(requests), settings.pairs(), check)
    return Comparison(
        name=name,
        theirs_is="the same engine and requests, nothing banned and nothing read",
        unit=watch.unit,
        limit=LIMIT,
        ours=values[0],
        theirs=values[1],
        shapes={
            "model": SHAPE.describe(),
            "prompts": PROMPTS,
            "group": GROUP,
            "prompt": PROMPT,
            "cells": GRID.size,
            "completions": [request.sampling.max_tokens for request in requests],
        },
    )


def _is_forward(model: Any, request: RolloutRequest, one: Completion) -> bool:
    """Whether what was read are the slice's logits of one plain forward pass."""
    with torch.no_grad():
        ids = torch.tensor([request.prompt_ids + one.token_ids])
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1, list(GRID.ids)]
    return one.scored is not None and np.allclose(one.scored, normalised_scores(logits.numpy()), atol=1e-4)
