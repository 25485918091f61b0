"""Templates to text: one ``KernelSpec`` in, one readable CUDA file out. Equal specs give equal bytes."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from marlin_gen import env
from marlin_gen.config import KernelConfig, KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.families.base import KernelFamily

log = logging.getLogger("marlin_gen")

# Config fields that are words become enumerators of these types in templates/include/marlin_gen/types.cuh.
ENUMS = {"partition": "marlin_gen::Partition", "dequant": "marlin_gen::Dequant"}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel. ``digest`` covers the text and every project header it includes, directly or not."""

    spec: KernelSpec
    symbol: str  # the kernel's extern "C" name
    text: str
    digest: str  # sha256, hex


@dataclass(frozen=True)
class Constant:
    """One ``static constexpr`` of the kernel's ``struct Config``."""

    type: str
    name: str
    value: str


def render(spec: KernelSpec) -> KernelSource:
    """The kernel of ``spec``; a ValueError with the family's sentence when its config is not legal.

    A file <spec.key>.cu in MARLIN_GEN_OVERRIDE_DIR is taken instead of the template's text.
    """
    return render_from(env.templates_dir(), FAMILIES.of(spec.config), spec)


def render_from(templates: Path, family: KernelFamily, spec: KernelSpec) -> KernelSource:
    """``render`` with the templates of another folder."""
    config, fmt, arch = spec.config, spec.format_row, spec.arch_row
    if reason := family.reject_reason(config, fmt, arch):
        raise ValueError(f"{spec.key} is not a legal kernel: {reason}")
    symbol = symbol_of(spec)
    override = (env.override_dir() or Path()) / f"{spec.key}.cu"
    if env.override_dir() and override.is_file():
        log.warning("using the hand-edited %s instead of the template", override)
        text = override.read_text(encoding="utf-8")
    else:
        values = family.template_values(spec)
        text = _environment(templates).get_template(f"{family.name}.cu.jinja").render(
            spec=spec, config=config, symbol=symbol, fmt=fmt, arch=arch, offset=camel_k(fmt.offset),
            config_constants=config_constants(config), family_constants=family_constants(values),
            threads=family.threads(config),
            smem_bytes=family.smem_bytes(config, fmt),
            max_registers=family.max_registers(config, arch),
            **values,
        )  # fmt: skip
    return KernelSource(spec, symbol, text, source_digest(text, templates / "include"))


def symbol_of(spec: KernelSpec) -> str:
    """The kernel's name in C: ``wgmma_m64n64k256_w4x1_s5_b1_c1_tiles_exact_u4b8g128_f16``."""
    return f"{spec.config.key}-{spec.weight_format}-{spec.act_dtype}".replace("-", "_")


def camel_k(name: str) -> str:
    """The device name of a host value: ``block_m`` is ``kBlockM``."""
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def config_constants(config: KernelConfig) -> list[Constant]:
    """Every field of the config, in order, but the family, which is the template itself."""
    constants = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ENUMS:
            kind = ENUMS[field.name]
            constants.append(Constant(kind, camel_k(field.name), f"{kind}::{camel_k(value)}"))
        elif field.name != "family":
            constants.append(Constant("int", camel_k(field.name), str(value)))
    return constants


def family_constants(values: Mapping[str, Any]) -> list[Constant]:
    """The numbers among a family's template values; lists to unroll are for the template itself."""
    constants = []
    for name, value in values.items():
        if isinstance(value, bool):
            constants.append(Constant("bool", camel_k(name), str(value).lower()))
        elif isinstance(value, int):
            constants.append(Constant("int", camel_k(name), str(value)))
    return constants


def include_closure(text: str, include: Path) -> dict[str, bytes]:
    """The project headers that ``text`` includes, directly or not: name below ``include`` -> bytes, sorted by name.

    Only quoted includes count; the compiler's own headers are covered by its version. A missing header is an error.
    """
    found: dict[str, bytes] = {}
    pending = _INCLUDE.findall(text)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        try:
            found[name] = (include / name).read_bytes()
        except FileNotFoundError as missing:
            raise FileNotFoundError(f'#include "{name}" names no header in {include}') from missing
        pending += _INCLUDE.findall(found[name].decode())
    return dict(sorted(found.items()))


def source_digest(text: str, include: Path) -> str:
    """sha256 (hex) of a kernel's text and every project header it includes, directly or not."""
    digest = hashlib.sha256()
    for name, content in [("kernel.cu", text.encode()), *include_closure(text, include).items()]:
        # Lengths keep two different splits of the same bytes apart.
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def _environment(templates: Path) -> jinja2.Environment:
    """Jinja whose marks are C++ comments and ``${ }``: PTX's ``{%0, %1}`` and C++'s ``{{0.f}}`` are plain text."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        line_statement_prefix="//%",
        line_comment_prefix="//#",
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
