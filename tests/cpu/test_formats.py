"""Every row of the format and dtype tables is consistent with the layout, the op and the config keys."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from marlin_gen import layout, op
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT, DTYPES, FORMATS, LAYOUT_VERSION, dtype, weight_format
from marlin_gen.problem import SIZE_UNIT, Problem, check_shape

TYPES = Path(__file__).resolve().parents[2] / "templates/include/marlin_gen/types.cuh"
ENUM = TYPES.read_text().split("enum class Offset")[1].split("};")[0]
OFFSETS = [name.lower() for name in re.findall(r"^  k(\w+)", ENUM, re.MULTILINE)]


@pytest.mark.parametrize("name", FORMATS)
def test_weight_format_row(name):
    fmt = FORMATS[name]
    assert fmt.name == name and weight_format(name) is fmt
    assert re.fullmatch(r"[a-z0-9]+", name), "a token of keys and file names"
    assert fmt.offset in OFFSETS and (0 < fmt.zero_point < fmt.codes) == (fmt.offset == "constant")
    assert fmt.group_size % SIZE_UNIT == 0 or SIZE_UNIT % fmt.group_size == 0
    n, k = 64, 2 * max(fmt.group_size, SIZE_UNIT)
    halves = n * (k // fmt.group_size) * (2 if fmt.has_offsets else 1) + n * (fmt.offset == "constant")
    assert fmt.packed_bytes(n, k) * 8 == n * k * fmt.bits + halves * 16


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_row(name):
    row = DTYPES[name]
    assert row.name == name and dtype(name) is row
    assert torch.empty(0, dtype=getattr(torch, row.torch_name)).element_size() == row.bytes
    assert op.ACT_DTYPES[getattr(torch, row.torch_name)] == name


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown weight format 'u3'; known: .*u4b8g128"):
        weight_format("u3")
    with pytest.raises(ValueError, match=r"unsupported activation dtype 'f64'; known: .*f16"):
        dtype("f64")


def test_the_ops_schema_has_the_defaults_of_the_tables():
    defaults = {
        argument.name: argument.default_value for argument in torch.ops.marlin_gen.gemm.default._schema.arguments
    }
    assert defaults["weight_format"] == DEFAULT_FORMAT
    assert defaults["layout_version"] == 2 < LAYOUT_VERSION == layout.LAYOUT_VERSION
    for implementation in (op._cuda, op._cpu, op._fake):
        parameters = inspect.signature(implementation).parameters
        assert {name: parameters[name].default for name in ("weight_format", "layout_version")} == {
            "weight_format": DEFAULT_FORMAT,
            "layout_version": 2,
        }


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [
        (0, 128, r"n=0 .* n=64"),
        (-64, 128, r"n=-64 .* n=64"),
        (63, 128, r"n=63 .* n=64"),
        (65, 128, r"n=65 .* n=128"),
        (64, 130, r"k=130 .* k=192"),
        (64, 192, r"group_size=128 does not divide k=192; quantise with a group_size in \[32, 64\], or pad k to 256"),
    ],
)
def test_check_shape_names_value_and_fix(n, k, message):
    with pytest.raises(ValueError, match=message):
        check_shape(n, k, FORMATS[DEFAULT_FORMAT])
    with pytest.raises(ValueError, match=message):
        Problem(n, k, 1)


def test_problem_refuses_negative_tokens_and_unknown_names():
    assert Problem(64, 128, 0).flops == 0
    with pytest.raises(ValueError, match="m=-1 is negative"):
        Problem(64, 128, -1)
    with pytest.raises(ValueError, match="unknown weight format"):
        Problem(64, 128, 1, "u3")
    with pytest.raises(ValueError, match="unsupported activation dtype"):
        Problem(64, 128, 1, DEFAULT_FORMAT, DEFAULT_DTYPE + "x")
