"""Compile kernels of a table from the templates as they are. Its rows, and so its times, stay.

    python tools/rebuild_table.py tuned/h200-132sm-4814gbs              # all of them, and defaults that it lacks
    python tools/rebuild_table.py tuned/h100-132sm-3352gbs --defaults   # only defaults that it lacks
    python tools/rebuild_table.py tuned/h100-132sm-3352gbs --format e4m3g128   # of one format

All, for a change of the templates that does not change how long kernels take, or until the GPU is at hand to tune
again: the table's bench, and its tests on that GPU, must be run with the new kernels. Also reads tables of an earlier
launch_version, which nothing else uses. Defaults, after a change of theirs: a look-up may name each. Kernels that
neither a row nor a look-up names any more are dropped. Extra: tune.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marlin_gen import whole_files  # noqa: E402
from marlin_gen.arch import Gpu  # noqa: E402
from marlin_gen.compile import compile_all, reject_artifact  # noqa: E402
from marlin_gen.config import KernelSpec  # noqa: E402
from marlin_gen.formats import FORMATS  # noqa: E402
from marlin_gen.measurement import Artifact  # noqa: E402
from marlin_gen.render import render  # noqa: E402
from marlin_gen.table import DispatchTable  # noqa: E402
from marlin_gen.table_file import FILE_NAME, check_seal, check_versions  # noqa: E402
from marlin_gen.table_row import KernelEntry, TableRow, defaults_beside, named_kernels  # noqa: E402


def compiled(specs: list[KernelSpec]) -> list[Artifact]:
    """SystemExit when one of them does not compile, or is no kernel that a tune would ship."""
    found = compile_all([render(spec) for spec in specs])
    faults = {spec: reject_artifact(r) if isinstance(r, Artifact) else str(r) for spec, r in found.items()}
    if failed := [f"{spec.key}: {fault}" for spec, fault in faults.items() if fault]:
        raise SystemExit("\n".join(failed))
    return [result for result in found.values() if isinstance(result, Artifact)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a table's folder")
    parser.add_argument("--defaults", action="store_true", help="compile only the defaults that the table lacks")
    parser.add_argument("--format", choices=sorted(FORMATS), help="compile only kernels of this weight format")
    options = parser.parse_args()
    path = options.table / FILE_NAME
    data = json.loads(content := path.read_bytes())
    try:
        check_seal(content)
        if options.defaults or options.format:  # the others stay as they are
            check_versions(data)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    gpu, rows = Gpu.from_json(data["gpu"]), [TableRow.from_json(row) for row in data["rows"]]
    defaults, named = defaults_beside(gpu, rows), named_kernels(gpu, rows)
    there = {key: KernelEntry.from_json(key, entry) for key, entry in data["kernels"].items() if key in named}
    missing = [spec for spec in defaults if spec.key not in there]
    chosen = missing if options.defaults else [*map(KernelSpec.from_key, there), *missing]
    artifacts = compiled([spec for spec in chosen if options.format in (None, spec.weight_format)])
    kernels = there | {artifact.spec.key: KernelEntry.of(artifact) for artifact in artifacts}
    table = DispatchTable(gpu, tuple(rows), kernels, tuple(data["runs"]), data["protocol"])
    with whole_files.locked(options.table):
        if path.read_bytes() != content:
            raise SystemExit(f"{path} was written by another process meanwhile; run this again")
        table.write(options.table, artifacts)
    print(f"{len(artifacts)} of {len(kernels)} kernels compiled, {len(rows)} rows")


if __name__ == "__main__":
    main()
