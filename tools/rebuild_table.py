"""Compile every kernel of a table anew, from the templates as they are. Its rows, and so its times, stay.

    python tools/rebuild_table.py tuned/h200-132sm-4814gbs [--out FOLDER]

For a change of the templates that does not change how long kernels take, or until the GPU is at hand to tune again:
the table's bench, and its tests on that GPU, must be run with the new kernels. Also reads tables of an earlier
launch_version, which nothing else uses. Extra: tune.
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
from marlin_gen.compile import compile_all  # noqa: E402
from marlin_gen.config import KernelSpec  # noqa: E402
from marlin_gen.measurement import Artifact  # noqa: E402
from marlin_gen.render import render  # noqa: E402
from marlin_gen.table import DispatchTable  # noqa: E402
from marlin_gen.table_file import FILE_NAME  # noqa: E402
from marlin_gen.table_row import KernelFile, TableRow  # noqa: E402


def rebuilt(path: Path) -> tuple[DispatchTable, list[Artifact]]:
    """The table of ``path`` with new kernels; SystemExit when one of them does not compile."""
    data = json.loads(path.read_bytes())
    gpu = Gpu.from_json(data["gpu"])
    found = compile_all([render(KernelSpec.from_key(key)) for key in data["kernels"]])
    artifacts = [result for result in found.values() if isinstance(result, Artifact)]
    if failed := [f"{spec.key}: {result}" for spec, result in found.items() if not isinstance(result, Artifact)]:
        raise SystemExit("\n".join(failed))
    rows = [TableRow.from_json(row) for row in data["rows"]]
    kernels = {artifact.spec.key: KernelFile.of(artifact) for artifact in artifacts}
    return DispatchTable(gpu, tuple(rows), kernels, tuple(data["runs"]), data["protocol"]), artifacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a table's folder")
    parser.add_argument("--out", type=Path, help="a folder of tables (default: that of the table)")
    options = parser.parse_args()
    table, artifacts = rebuilt(options.table / FILE_NAME)
    folder = options.out / options.table.name if options.out else options.table
    folder.mkdir(parents=True, exist_ok=True)
    with whole_files.locked(folder):
        table.write(folder, artifacts)
    print(f"{len(artifacts)} kernels of {len(table.rows)} rows")


if __name__ == "__main__":
    main()
