"""The choice between the kernel families where nothing was tuned, against what was timed."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from tables import H100, H200

from marlin_gen.bench import geomean
from marlin_gen.families.defaults import default_plan
from marlin_gen.problem import Problem

GPUS = {"h100": H100, "h200": H200}
SIXTEEN_TOKENS = Path(__file__).parents[1] / "fixtures" / "sixteen_tokens.csv"  # gpu, n, k, config, us; 2026-11-27


@pytest.mark.parametrize("gpu", GPUS)
def test_from_nine_to_sixteen_tokens_the_choice_is_as_timed(gpu: str) -> None:
    """18 shapes with 14 configs each. The mma family alone is 2 % from the best on an H100 and 12 % on an H200."""
    timed: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    with SIXTEEN_TOKENS.open() as file:
        for row in csv.DictReader(file):
            if row["gpu"] == gpu:
                timed[int(row["n"]), int(row["k"])][row["config"]] = float(row["us"])
    problems = {shape: Problem(*shape, 16) for shape in timed}
    chosen = {shape: default_plan(problem, GPUS[gpu]).config.key for shape, problem in problems.items()}
    losses = {shape: us[chosen[shape]] / min(us.values()) for shape, us in timed.items() if chosen[shape] in us}
    assert len(losses) >= 17 and max(losses.values()) < 1.03 and geomean(list(losses.values())) < 1.005, losses
    for tokens in (9, 12):
        assert chosen == {s: default_plan(replace(p, m=tokens), GPUS[gpu]).config.key for s, p in problems.items()}


@pytest.mark.parametrize(
    ("fmt", "family"),
    [("u4b8g128", "wgmma"), ("u4zg128", "wgmma"), ("u4b8g32", "mma"), ("u4fg64", "mma"), ("u8b128g128", "mma")],
)
def test_wgmma_serves_few_tokens_where_scales_can_be_deferred_and_memory_is_not_all(fmt: str, family: str) -> None:
    for tokens, expected in ((1, "mma"), (8, "mma"), (12, family)):
        assert default_plan(Problem(16384, 3072, tokens, fmt), H100).config.family == expected
