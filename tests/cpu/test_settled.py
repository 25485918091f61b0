"""What a dependent launch may read early: tensors that were there before and have not changed since."""

from __future__ import annotations

import gc

import pytest
import torch

from marlin_gen.settled import Settled


@pytest.fixture
def settled() -> Settled:
    return Settled()


def test_from_the_second_time_on(settled: Settled) -> None:
    weight, scales = torch.zeros(4), torch.zeros(4)
    assert [settled(weight, scales) for _ in range(3)] == [False, True, True]


def test_one_new_tensor_is_enough_to_wait(settled: Settled) -> None:
    weight = torch.zeros(4)
    settled(weight)
    assert not settled(weight, torch.zeros(4))


@pytest.mark.parametrize("change", [torch.Tensor.zero_, lambda t: t[1:].fill_(3), lambda t: t.copy_(torch.ones(4))])
def test_a_changed_tensor_waits_once(settled: Settled, change) -> None:
    weight = torch.zeros(4)
    settled(weight)
    change(weight)
    assert [settled(weight), settled(weight)] == [False, True]


def test_another_tensor_in_the_same_memory_waits(settled: Settled) -> None:
    for _ in range(20):  # CPython gives a freed object's id to the next of its size
        weight = torch.zeros(4)
        assert not settled(weight)
        del weight
        gc.collect()


def test_nothing_is_kept_alive_or_remembered(settled: Settled) -> None:
    weight = torch.zeros(4)
    settled(weight)
    assert len(settled._known) == 1
    del weight
    gc.collect()
    assert not settled._known


def test_inference_tensors_have_no_version_and_always_wait(settled: Settled) -> None:
    with torch.inference_mode():
        weight = torch.zeros(4)
    assert [settled(weight) for _ in range(3)] == [False] * 3
