"""The wheel's build hook: the native launcher, built, beside its sources. Without a C++ compiler nothing is added."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TARGET = "marlin_gen/csrc"


class LauncherHook(BuildHookInterface):  # type: ignore[type-arg]
    """One library for every Python and every torch from 2.10 on: the wheel is of a platform, and of nothing else."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # a checkout builds it into the cache, when it is needed
            return
        root = Path(self.root)
        sys.path.insert(0, str(root))
        from marlin_gen import native_build

        folder = root / TARGET
        try:
            built = native_build.build(folder, Path(self.directory) / f".{native_build.LIBRARY}")
        except native_build.BuildError as error:
            self.app.display_warning(f"{error}. The wheel has no native launcher: kernels are launched from Python")
            return
        build_data["force_include"][str(built)] = f"{TARGET}/{native_build.LIBRARY}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        for path in build_data["force_include"]:
            if Path(path).parent == Path(self.directory):
                Path(path).unlink(missing_ok=True)
