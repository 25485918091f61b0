"""Finding nvcc and NVRTC: the order, what is missing, what is broken, and that each works alone."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from marlin_gen import toolchain
from marlin_gen.toolchain import ToolchainError, find_toolchain


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this shell decides: no toolkit, no setting."""
    for name in ("MARLIN_GEN_NVCC", "MARLIN_GEN_COMPILER", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_in_wheel", lambda *_: None)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(path: Path, version: str = "13.0.1") -> Path:
    minor = ".".join(version.split(".")[:2])
    return script(path, f'echo "Cuda compilation tools, release {minor}, V{version}"')


@pytest.mark.parametrize("name", ["nvcc", "nvrtc"])
def test_the_wheels_work_alone(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With no toolkit and nothing of it on PATH; nvcc sees a host compiler, NVRTC sees nothing at all."""
    if name == "nvcc":
        gcc = toolchain.env.which("gcc")
        if not gcc:
            pytest.skip("no host C++ compiler")
        monkeypatch.setenv("PATH", str(gcc.parent))
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    found = find_toolchain(name)
    assert "wheel" in found.origin
    found.probe()


def test_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Explicit setting, wheels, CUDA_HOME, PATH."""
    script(tmp_path / "path" / "gcc", "exit 0")
    on_path = fake_nvcc(tmp_path / "path" / "nvcc")
    at_home = fake_nvcc(tmp_path / "home" / "bin" / "nvcc")
    explicit = fake_nvcc(tmp_path / "explicit")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(explicit))
    assert find_toolchain("nvcc").path == explicit
    assert find_toolchain("auto").path == explicit  # the setting decides over NVRTC as well
    monkeypatch.delenv("MARLIN_GEN_NVCC")
    assert find_toolchain("nvcc").origin == "the PyPI wheels"
    monkeypatch.setattr(toolchain, "_in_wheel", lambda *_: None)
    assert find_toolchain("nvcc").path == at_home
    monkeypatch.delenv("CUDA_HOME")
    assert find_toolchain("nvcc").path == on_path


@pytest.mark.usefixtures("no_wheels")
def test_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"pip install 'marlin_gen\[nvcc\]'"):
        find_toolchain("nvcc")
    with pytest.raises(ToolchainError, match=r"pip install 'marlin_gen\[nvrtc\]'"):
        find_toolchain("nvrtc")
    with pytest.raises(ToolchainError, match=r"(?s)no CUDA compiler.*nvrtc.*nvcc"):
        find_toolchain()


def test_broken_explicit_setting_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(tmp_path / "absent"))
    with pytest.raises(ToolchainError, match="is not a file"):
        find_toolchain()
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(script(tmp_path / "nvcc", "echo broken >&2; exit 1")))
    with pytest.raises(ToolchainError, match="is broken: broken"):
        find_toolchain()
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(fake_nvcc(tmp_path / "old", "11.8.89")))
    with pytest.raises(ToolchainError, match=r"nvcc 11\.8\.89 .* is older than"):
        find_toolchain()


@pytest.mark.usefixtures("no_wheels")
def test_cuda_home_without_nvcc_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"CUDA_HOME=.* has no bin/nvcc"):
        find_toolchain("nvcc")


def test_no_host_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvcc says what it lacks; auto works."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"install g\+\+, or use NVRTC"):
        find_toolchain("nvcc")
    assert find_toolchain().name == "nvrtc"


def test_mixed_wheels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    other = {"nvidia-cuda-crt": "12.9.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or real(name))
    with pytest.raises(ToolchainError, match=r"different CUDA versions .*nvidia-cuda-crt 12\.9\.1.*pip install"):
        find_toolchain("nvcc")


def test_missing_part_of_the_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "nvidia-nvvm":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ToolchainError, match="nvidia-nvvm, a part of nvcc, is not installed"):
        find_toolchain("nvcc")


def test_probe_repeats_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = 'case "$1" in --version) echo "release 13.0, V13.0.1"; exit;; esac'
    broken = script(tmp_path / "nvcc", f"{version}\necho no cicc >&2; exit 1")
    monkeypatch.setenv("MARLIN_GEN_NVCC", str(broken))
    with pytest.raises(ToolchainError, match=r"(?s)is broken.*no cicc"):
        find_toolchain("nvcc").probe()


def test_unknown_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'clang' is not one of auto, nvcc, nvrtc"):
        find_toolchain("clang")
    monkeypatch.setenv("MARLIN_GEN_COMPILER", "gcc")
    with pytest.raises(ValueError, match="MARLIN_GEN_COMPILER='gcc' is not one of"):
        find_toolchain()
