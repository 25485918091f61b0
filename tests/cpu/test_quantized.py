"""The neutral form of a quantised weight: its arithmetic, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from marlin_gen.checkpoints.quantized import QuantizedWeight

CODES = torch.tensor([[0, 15, 8, 3], [1, 2, 4, 7]], dtype=torch.uint8)
SCALES = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, [[-4.0, 3.5, 0.0, -10.0], [-7.0, -6.0, -1.0, -0.25]]),
        ({"zeros": torch.tensor([[0, 15], [2, 4]], dtype=torch.uint8)}, [[0, 7.5, -14, -24], [-1, 0, 0, 0.75]]),
        ({"zeros": torch.tensor([[0.5, 8.25], [1.5, 3.0]])}, [[-0.25, 7.25, -0.5, -10.5], [-0.5, 0.5, 0.25, 1.0]]),
        ({"minima": torch.tensor([[-1.0, 0.5], [0.0, 2.0]])}, [[-1.0, 6.5, 16.5, 6.5], [1.0, 2.0, 3.0, 3.75]]),
        ({"order": torch.tensor([2, 0, 3, 1])}, [[3.5, -10.0, -4.0, 0.0], [-6.0, -0.25, -7.0, -1.0]]),
    ],
    ids=["symmetric", "whole zeros", "floating zeros", "minima", "order"],
)
def test_dequantize(fields, weight):
    found = QuantizedWeight(CODES, SCALES, bits=4, group_size=2, **fields).dequantize()
    assert torch.equal(found, torch.tensor(weight, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"group_size": 3}, "k a multiple of 3"),
        ({"codes": CODES.int()}, "needs torch.uint8"),
        ({"scales": SCALES[:, :1]}, r"scales have shape \[2, 1\]; n=2, k=4 in groups of 2 need \[2, 2\]"),
        ({"zeros": SCALES.T[:1]}, "zeros have shape"),
        ({"zeros": SCALES, "minima": SCALES}, "not both"),
        ({"order": torch.tensor([0, 1, 1, 3])}, "not a permutation of the 4"),
    ],
)
def test_refuses(fields, says):
    with pytest.raises(ValueError, match=says):
        QuantizedWeight(**{"codes": CODES, "scales": SCALES, "bits": 4, "group_size": 2, **fields})
