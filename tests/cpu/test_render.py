"""Rendering: equal specs give equal bytes, illegal ones a sentence, and the committed goldens show what changes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jinja2
import pytest

from marlin_gen import env
from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT, FORMATS
from marlin_gen.render import camel_k, include_closure, render, render_from, symbol_of

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def default_specs() -> list[KernelSpec]:
    """Every default of every family on every arch."""
    return [
        KernelSpec(config, DEFAULT_FORMAT, DEFAULT_DTYPE, arch.name)
        for arch in ARCHS.values()
        for family in FAMILIES.rows.values()
        for config in family.defaults(arch, FORMATS[DEFAULT_FORMAT])
    ]


def golden_specs() -> list[KernelSpec]:
    """A handful, never one per config: the first and last default of each family on sm_90a, the first on sm_80."""
    chosen: dict[KernelSpec, None] = {}
    for name in FAMILIES.rows:
        hopper = [s for s in default_specs() if s.config.family == name and s.arch == "sm_90a"]
        ampere = [s for s in default_specs() if s.config.family == name and s.arch == "sm_80"]
        chosen.update(dict.fromkeys([hopper[0], hopper[-1], *ampere[:1]]))
    return list(chosen)


EXAMPLE = default_specs()[-1]


@pytest.mark.parametrize("spec", golden_specs(), ids=lambda s: s.key)
def test_golden(spec: KernelSpec, request: pytest.FixtureRequest) -> None:
    """After a wanted change: pytest tests/cpu/test_render.py --update-goldens, and review the diff."""
    path = GOLDEN / f"{spec.key}.cu"
    if request.config.getoption("--update-goldens"):
        path.write_text(render(spec).text)
    assert path.is_file(), "no golden; run with --update-goldens"
    assert render(spec).text == path.read_text()


def test_no_stale_goldens(request: pytest.FixtureRequest) -> None:
    wanted = {f"{spec.key}.cu" for spec in golden_specs()}
    for path in GOLDEN.glob("*.cu"):
        if path.name not in wanted and request.config.getoption("--update-goldens"):
            path.unlink()
    assert {path.name for path in GOLDEN.glob("*.cu")} == wanted


@pytest.mark.parametrize("spec", default_specs(), ids=lambda s: s.key)
def test_every_default_renders(spec: KernelSpec) -> None:
    source = render(spec)
    assert f"// spec     {spec.key}\n" in source.text
    assert f"// render   marlin-gen render {spec.key}\n" in source.text
    assert re.search(rf"\b{source.symbol}\(", source.text), "the kernel is called by its symbol"
    assert not re.search(r"\$\{|//%|//#", source.text), "nothing of the template language is left"
    assert not re.search(r"(?<![\w/])/(home|root|tmp|usr|work)/", source.text), "no path of a machine"


def test_every_config_field_is_a_constant_of_its_own_name() -> None:
    text = render(EXAMPLE).text
    for field in fields(EXAMPLE.config):
        value = getattr(EXAMPLE.config, field.name)
        if isinstance(value, int):
            assert f"static constexpr int {camel_k(field.name)} = {value};\n" in text
    assert camel_k("blocks_per_sm") == "kBlocksPerSm"
    assert f"marlin_gen::Partition::k{EXAMPLE.config.partition.capitalize()};\n" in text
    assert f"marlin_gen::Dequant::k{EXAMPLE.config.dequant.capitalize()};\n" in text


def test_host_numbers_are_the_familys() -> None:
    text = render(EXAMPLE).text
    family, config = FAMILIES.of(EXAMPLE.config), EXAMPLE.config
    assert f"kThreads = {family.threads(config)};" in text
    assert f"kSmemBytes = {family.smem_bytes(config, EXAMPLE.format_row)};" in text
    assert f"kMaxRegisters = {family.max_registers(config, EXAMPLE.arch_row)};" in text


def test_equal_in_every_process() -> None:
    """Not by luck of hash seeds."""
    code = "import sys; from marlin_gen.render import *; print(render(KernelSpec.from_key(sys.argv[1])).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, EXAMPLE.key], cwd=ROOT, env=env.child_environment(PYTHONHASHSEED=seed),
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert digests == {render(EXAMPLE).digest}


def test_two_configs_differ_in_few_lines() -> None:
    """All values are in one struct: another pipeline depth changes constants and names, not code."""
    family = FAMILIES.of(EXAMPLE.config)
    other = next(
        spec
        for stages in family.axes(EXAMPLE.arch_row)["num_stages"]
        if (spec := replace(EXAMPLE, config=replace(EXAMPLE.config, num_stages=stages))) != EXAMPLE
        and family.reject_reason(spec.config, spec.format_row, spec.arch_row) is None
    )
    one, two = render(EXAMPLE).text.splitlines(), render(other).text.splitlines()
    assert len(one) == len(two)
    assert 3 <= sum(a != b for a, b in zip(one, two, strict=True)) <= 8


def test_an_illegal_config_is_refused_in_the_familys_words() -> None:
    spec = replace(EXAMPLE, config=replace(EXAMPLE.config, num_stages=1000))
    reason = FAMILIES.of(spec.config).reject_reason(spec.config, spec.format_row, spec.arch_row)
    assert reason
    with pytest.raises(ValueError, match="is not a legal kernel") as raised:
        render(spec)
    assert reason in str(raised.value) and spec.key in str(raised.value)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kernel family 'nosuch'"):
        render(replace(EXAMPLE, config=replace(EXAMPLE.config, family="nosuch")))


def test_symbol() -> None:
    config = KernelConfig.from_key("wgmma-m64n64k256-w4x1-s5-b1-c1-tiles-exact")
    symbol = symbol_of(KernelSpec(config, "u4b8g128", "f16", "sm_90a"))
    assert symbol == "wgmma_m64n64k256_w4x1_s5_b1_c1_tiles_exact_u4b8g128_f16"


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A copy of the templates, to be changed."""
    return Path(shutil.copytree(env.templates_dir(), tmp_path / "templates"))


def test_a_misspelt_name_is_an_error(templates: Path) -> None:
    path = templates / f"{EXAMPLE.config.family}.cu.jinja"
    path.write_text(path.read_text() + "// ${ symbool }\n")
    with pytest.raises(jinja2.UndefinedError, match="symbool"):
        render_from(templates, FAMILIES.of(EXAMPLE.config), EXAMPLE)


def test_the_digest_covers_every_header(templates: Path) -> None:
    family = FAMILIES.of(EXAMPLE.config)
    source = render_from(templates, family, EXAMPLE)
    assert source == render(EXAMPLE)  # the folder is not part of it
    headers = include_closure(source.text, templates / "include")
    assert "marlin_gen/types.cuh" in headers
    for name in headers:
        header = templates / "include" / name
        before = header.read_text()
        header.write_text(before + "// changed\n")
        assert render_from(templates, family, EXAMPLE).digest != source.digest, name
        header.write_text(before)
    (templates / "include" / "marlin_gen" / "unused.cuh").write_text("#pragma once\n")
    assert render_from(templates, family, EXAMPLE).digest == source.digest


def test_a_missing_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#include "b.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"b\.cuh"):
        include_closure('#include "a.cuh"\n', tmp_path)


def test_a_hand_edited_kernel_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = render(EXAMPLE)
    monkeypatch.setenv("MARLIN_GEN_OVERRIDE_DIR", str(tmp_path))
    assert render(EXAMPLE) == plain  # no such file: the template
    (tmp_path / f"{EXAMPLE.key}.cu").write_text(plain.text + "// edited\n")
    edited = render(EXAMPLE)
    assert edited.text == plain.text + "// edited\n" and edited.digest != plain.digest and edited.symbol == plain.symbol
