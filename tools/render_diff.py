"""Which kernels a change alters: render every default spec and every spec of the shipped tables at two git revisions.

    python tools/render_diff.py main HEAD            # counts and keys
    python tools/render_diff.py main HEAD --text     # with the differences
    python tools/render_diff.py HEAD                 # a revision against the working tree

A refactoring proves itself by "0 changed". Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs inside each tree, so that both its templates and its Python decide.
RENDER_ALL = """
import json, re, sys
from pathlib import Path
from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelSpec
from marlin_gen.families import FAMILIES
from marlin_gen.formats import DTYPES, FORMATS
from marlin_gen.render import render
specs = {
    KernelSpec(config, fmt.name, dtype, arch.name)
    for arch in ARCHS.values() for fmt in FORMATS.values() for dtype in DTYPES
    for family in FAMILIES.rows.values() for config in family.defaults(arch, fmt)
}
for cubin in Path("tuned").rglob("*.cubin"):
    try:
        specs.add(KernelSpec.from_key(re.sub(r"-[0-9a-f]{12}$", "", cubin.stem)))
    except ValueError as error:
        print(f"skipped {cubin.name}: {error}", file=sys.stderr)
texts = {}
for spec in sorted(specs):
    try:
        texts[spec.key] = render(spec).text
    except ValueError as error:
        texts[spec.key] = f"{error}\\n"
json.dump(texts, sys.stdout)
"""


def rendered(tree: Path) -> dict[str, str]:
    """Spec key -> text, by the code of ``tree``."""
    done = subprocess.run([sys.executable, "-c", RENDER_ALL], cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    texts: dict[str, str] = json.loads(done.stdout)
    return texts


def rendered_at(revision: str) -> dict[str, str]:
    """``rendered`` of a git revision, from an archive in a temporary folder."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return rendered(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="git revision")
    parser.add_argument("after", nargs="?", help="git revision; the working tree when left out")
    parser.add_argument("--text", action="store_true", help="print the differences")
    arguments = parser.parse_args()
    before = rendered_at(arguments.before)
    after = rendered_at(arguments.after) if arguments.after else rendered(ROOT)
    common = sorted(before.keys() & after.keys())
    changed = [key for key in common if before[key] != after[key]]
    for mark, keys in (("-", before.keys() - after.keys()), ("+", after.keys() - before.keys()), ("~", changed)):
        for key in sorted(keys):
            print(mark, key)
            if mark == "~" and arguments.text:
                lines = difflib.unified_diff(before[key].splitlines(), after[key].splitlines(), lineterm="", n=2)
                print("\n".join(list(lines)[2:]))
    print(f"{len(common)} specs rendered on both sides, {len(changed)} changed")
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
