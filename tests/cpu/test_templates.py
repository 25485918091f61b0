"""The rules that keep templates readable CUDA: style, not semantics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marlin_gen import env
from marlin_gen.families import FAMILIES

TEMPLATES = sorted(env.templates_dir().glob("*.cu.jinja"))
HEADERS = sorted(env.templates_dir().rglob("*.cuh"))
MAX_CONDITIONS = 6

each_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
each_header = pytest.mark.parametrize("path", HEADERS, ids=lambda p: p.name)


def test_one_template_per_family() -> None:
    assert {path.name for path in TEMPLATES} == {f"{name}.cu.jinja" for name in FAMILIES.rows}


@each_template
def test_numbers_come_from_config(path: Path) -> None:
    """Outside loops a template prints only the kernel's name: every number is a member of ``struct Config``."""
    depth = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        statement = re.match(r"\s*//%\s*(\w+)", line)
        if statement:
            depth += {"for": 1, "endfor": -1}.get(statement[1], 0)
        elif depth == 0:
            printed = set(re.findall(r"\$\{\s*(.*?)\s*\}", line))
            assert printed <= {"symbol"}, f"{path.name}:{number} prints {printed - {'symbol'}}; use a Config member"


@each_template
def test_few_flat_conditions(path: Path) -> None:
    tests = []
    depth = 0
    for line in path.read_text().splitlines():
        statement = re.match(r"\s*//%\s*(if|elif|endif)\b(.*)", line)
        if not statement:
            continue
        depth += {"if": 1, "elif": 0, "endif": -1}[statement[1]]
        assert depth <= 1, f"{path.name}: an //% if inside an //% if"
        if statement[1] != "endif":
            tests.append(statement[2].strip())
    assert len(tests) <= MAX_CONDITIONS, f"{path.name} has {len(tests)} conditions: it is two templates"
    assert len(set(tests)) == len(tests), f"{path.name} tests a flag twice: extract a phase"


@each_template
def test_no_ptx_no_macros_no_chains(path: Path) -> None:
    text = path.read_text()
    for pattern, instead in (
        (r"\basm\b", "put PTX in include/marlin_gen/ptx"),
        (r"^\s*#\s*define\b", "use constexpr"),
        (r"^\s*#\s*(if|ifdef|ifndef)\b", "use if constexpr"),
        (r"\{%|%\}|\{\{.*\|", "use //% statements"),
    ):
        found = re.search(pattern, text, re.MULTILINE)
        assert not found, f"{path.name}: {found[0]!r}; {instead}"
    statements = re.findall(r"//%\s*(?:include|import|from|extends)\s*(.*)", text)
    own = re.compile(rf'"_{path.name.split(".")[0]}_\w+\.jinja"')
    assert statements[0] == '"_prologue.jinja"' and all(map(own.fullmatch, statements[1:])), "its own parts alone"
    parts = [path.parent / statement.strip('"') for statement in statements]
    assert not any(re.search(r"//%\s*(include|import|from|extends)", part.read_text()) for part in parts), "no chains"


@each_template
def test_host_numbers_are_asserted(path: Path) -> None:
    """Host and device cannot drift: the kernel asserts the shared memory that it is launched with."""
    assert re.search(r"static_assert\([^;]*Config::kSmemBytes", path.read_text(), re.DOTALL)


@each_header
def test_headers_are_plain_cuda(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"//%|//#|\$\{", text), "no Jinja in headers"
    assert "#pragma once" in text
    system = re.findall(r"#\s*include\s*<.*?>", text)
    assert not system, f"{system}: kernels use no standard header; they compile in a fraction of the time without"
