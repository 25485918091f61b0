"""The kernels that users get on this GPU: every one that a table ships, and every family default."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from marlin_gen.arch import arch_for
from marlin_gen.config import KernelSpec
from marlin_gen.dispatch import KernelLocation
from marlin_gen.families.defaults import default_specs
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.installed import find_tables
from marlin_gen.launch import Kernel, Launcher
from marlin_gen.measurement import Artifact
from marlin_gen.table import DispatchTable


@cache
def tables() -> tuple[DispatchTable, ...]:
    """The tables measured on GPUs of this one's compute capability."""
    capability = torch.cuda.get_device_capability()
    return tuple(table for table in find_tables() if table.gpu.capability == capability)


def specs() -> list[KernelSpec]:
    """Sorted; none where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    found = {KernelSpec.from_key(key) for table in tables() for key in table.kernels}
    return sorted(found | set(defaults()), key=lambda spec: spec.key)


def defaults() -> list[KernelSpec]:
    """What families choose without a table."""
    arch = arch_for(torch.cuda.get_device_capability())
    return default_specs(arch, product(FORMATS, DTYPES))


@cache
def compiled() -> dict[KernelSpec, KernelLocation | str]:
    """The defaults that no table ships, compiled in one batch; a sentence for one that cannot be."""
    missing = [spec for spec in defaults() if not any(spec.key in table.kernels for table in tables())]
    if not missing:
        return {}
    from marlin_gen.toolchain import ToolchainError

    try:
        from marlin_gen.compile import compile_all
        from marlin_gen.render import render

        results = compile_all([render(spec) for spec in missing])
    except (ImportError, ToolchainError) as error:
        return dict.fromkeys(missing, f"no table ships it, and it cannot be compiled: {error}")
    return {
        spec: KernelLocation(result.cubin, result.symbol) if isinstance(result, Artifact) else result.reason
        for spec, result in results.items()
    }


def location(spec: KernelSpec) -> KernelLocation:
    """The table's cubin, intact or the test fails; else the compiled default; a skip where there is no compiler."""
    for table in tables():
        if spec.key in table.kernels:
            cubin = table.cubin(spec.key)
            assert cubin, f"the cubin of {spec.key} is missing or not the one that {table.folder} names"
            return KernelLocation(table.folder, table.kernels[spec.key].symbol, cubin)
    found = compiled()[spec]
    if isinstance(found, str):
        if "cannot be compiled" in found:
            pytest.skip(found)
        pytest.fail(f"{spec.key} does not compile: {found}")
    return found


@cache
def kernel(spec: KernelSpec) -> Kernel:
    """Loaded, once a process."""
    found = location(spec)
    return Launcher.for_device(torch.cuda.current_device()).load(found.place, found.symbol, spec, found.image)
