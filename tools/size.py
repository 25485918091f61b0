"""Line budgets. A breach is a question about the design first: is a file still one idea, and is the total worth it?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {".py": 250, ".jinja": 450, ".cuh": 250, ".cpp": 250, ".h": 250}  # lines a file
# Lines of everything but tests: 12500 until transformers and export, 16500 until the native launcher, 18000 until whole
# models were compiled, PTX shipped and the gather kernel, 19500 until strangers read it (threads, wrong input), 19750
# until fp8, 20000 until strangers read it again, 20400 until numbers of tokens between powers of two, 20550 until
# kernels were packed, 20700 until they served every GPU of their architecture.
TOTAL = 20750


def tracked() -> list[Path]:
    """The files of the repository that have a budget: neither tests nor generated."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = [Path(name) for name in names if Path(name).suffix in BUDGETS and not name.startswith("tests/")]
    return [path for path in paths if (ROOT / path).is_file() and not written_by_a_tool(ROOT / path)]


def written_by_a_tool(path: Path) -> bool:
    """Such a file is not read top to bottom; its tool is."""
    return "Written by tools/" in path.read_text()[:400]


def main() -> int:
    lines = {path: (ROOT / path).read_text().count("\n") for path in tracked()}
    breaches = [f"{path}: {count} lines, the budget of a {path.suffix} file is {BUDGETS[path.suffix]}"
                for path, count in sorted(lines.items()) if count > BUDGETS[path.suffix]]  # fmt: skip
    total = sum(lines.values())
    if total > TOTAL:
        breaches.append(f"{total} lines in all, the budget is {TOTAL}")
    folders: dict[str, int] = {}
    for path, count in lines.items():
        folders[path.parts[0]] = folders.get(path.parts[0], 0) + count
    print(", ".join(f"{name} {count}" for name, count in sorted(folders.items())), f"= {total} lines")
    for breach in breaches:
        print(breach, file=sys.stderr)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
