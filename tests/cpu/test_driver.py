"""What the driver says of a GPU, and what it leaves unsaid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from marlin_gen import driver
from marlin_gen.cost_model import predict_us
from marlin_gen.families.defaults import default_plan
from marlin_gen.problem import Problem

ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0, "MULTIPROCESSOR_COUNT": 132,
    "L2_CACHE_SIZE": 50 << 20, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 228 << 10,
    "MEMORY_CLOCK_RATE": 2_619_000, "GLOBAL_MEMORY_BUS_WIDTH": 5120,
}  # fmt: skip


def say(monkeypatch: pytest.MonkeyPatch, **attributes: int) -> None:
    """A driver that answers with these attributes."""
    known = {f"CU_DEVICE_ATTRIBUTE_{name}": value for name, value in (ATTRIBUTES | attributes).items()}
    answers = {"cuInit": None, "cuDeviceGet": 0, "cuDeviceGetName": b"NVIDIA H100 80GB HBM3\0\0"}

    def call(name: str, *arguments: Any) -> Any:
        return arguments[0] if name == "cuDeviceGetAttribute" else answers[name]

    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "_driver", lambda: SimpleNamespace(CUdevice_attribute=SimpleNamespace(**known)))


def test_a_gpu_is_what_its_attributes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch)
    assert driver.identify(0).slug == "h100-132sm-3352gbs"


@pytest.mark.parametrize("silent", ["MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH"])
def test_a_gpu_that_does_not_say_its_bandwidth_works_like_any(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of its own class, so that a table made on it serves it; defaults and predictions are finite."""
    say(monkeypatch, **{silent: 0})
    found = driver.identify(0)
    assert found.bandwidth_gbs > 0 and found.same_class(found)
    problem = Problem(16384, 3072, 16)
    assert 0 < predict_us([default_plan(problem, found).config], [problem], found)[0, 0] < 1e6
