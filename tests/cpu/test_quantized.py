"""The neutral form of a quantised weight: its arithmetic, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_gen.checkpoints.fallback import dense
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
        ({"zeros": SCALES, "minima": SCALES}, "not two of these"),
        ({"zeros": SCALES, "is_float": True}, "not two of these"),
        ({"order": torch.tensor([0, 1, 1, 3])}, "not a permutation of the 4"),
    ],
)
def test_refuses(fields, says):
    with pytest.raises(ValueError, match=says):
        QuantizedWeight(**{"codes": CODES, "scales": SCALES, "bits": 4, "group_size": 2, **fields})


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("offset", ["none", "zeros", "minima"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_weight_is_made_in_pieces_and_the_same_bit_for_bit(offset, dtype):
    """A whole one in float64 is four times the result, for each step of the arithmetic."""
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4100, 1024), dtype=torch.uint8, generator=drawn)
    scales, offsets = torch.randn(2, 4100, 32, generator=drawn)
    fields = {} if offset == "none" else {offset: offsets}
    order = torch.randperm(1024, generator=drawn) if offset == "zeros" else None
    weight = QuantizedWeight(codes, scales, bits=4, group_size=32, order=order, **fields)
    with Largest() as largest:
        found = dense(weight, "weight", dtype)
    assert torch.equal(found, weight.dequantize().to(dtype)) and largest.nbytes <= found.nbytes


@pytest.mark.parametrize("row", [0, 4099])
def test_a_dense_weight_beyond_its_type_is_named_wherever_it_is(row):
    weight = QuantizedWeight(torch.zeros(4100, 1024, dtype=torch.uint8), torch.ones(4100, 1), bits=4, group_size=1024)
    weight.scales[row] = 1e6
    with pytest.raises(ValueError, match=r"^token_embd has weights beyond the range of torch\.float16"):
        dense(weight, "token_embd")
