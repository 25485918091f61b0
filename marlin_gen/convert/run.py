"""Convert a checkpoint: shard by shard, layer by layer, so that a killed run is taken up by the next one."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from marlin_gen.checkpoints.fallback import Unheld, packed_or_dense
from marlin_gen.checkpoints.quantized import QuantizedWeight
from marlin_gen.convert.shard import ShardWriter, about, is_intact, read_header, write_text
from marlin_gen.convert.source import Source, Unit, open_source
from marlin_gen.formats import LAYOUT_VERSION
from marlin_gen.layout import PackedWeight
from marlin_gen.nn import QuantLinear
from marlin_gen.whole_files import locked

SHARD_BYTES = 2 << 30  # of the source; what a killed run may have to do again
_HEADER_BYTES = 1024  # of a unit beside its name: three entries, its format or a reason
ToLayout = Callable[[QuantizedWeight, str], "PackedWeight | Unheld"]
Progress = Callable[[int, int, str], None]  # units done, units in all, what was last done


@dataclass
class Report:
    """What became of the layers."""

    folder: Path
    formats: dict[str, str] = field(default_factory=dict)  # layer -> weight format
    unheld: dict[str, str] = field(default_factory=dict)  # layer -> why it is dequantised
    shards_kept: int = 0
    shards_written: int = 0
    nbytes: int = 0
    notes: list[str] = field(default_factory=list)


def convert(
    source_path: Path | str,
    folder: Path | str,
    keep_unsupported: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total, said: None,
) -> Report:
    """The checkpoint at ``source_path`` (a folder of safetensors or a .gguf file) in the packed layout, in ``folder``.

    Activations will be in ``dtype`` (float16 or bfloat16), to which scales are rounded; without it, in the type of the
    checkpoint's scales, and every weight exactly. Layers are repacked on ``device``, one at a time. A run that was
    stopped in any way is taken up: shards that are whole are checked byte by byte and kept. config.json comes last: a
    folder that has it is complete.

    Raises ValueError with the name of a tensor that is damaged, of a layer that no kernel format holds (with
    ``keep_unsupported`` those are written dequantised, and one warning lists them), or of a file in the way.
    """
    source, out = open_source(Path(source_path)), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if source.path.resolve() == out.resolve():
        raise ValueError(f"{out} is the checkpoint itself: name another folder")
    if foreign := [path for path in sorted(out.iterdir()) if _is_foreign(path)]:
        raise ValueError(
            f"{foreign[0]} was not written by marlin-gen convert, or is cut: remove it, or name another folder"
        )
    activations = dtype or source.dtype

    def to_layout(weight: QuantizedWeight, name: str) -> PackedWeight | Unheld:
        return packed_or_dense(_moved(weight, device), name, activations, exact=dtype is None)

    with ExitStack() as held:
        try:
            held.enter_context(locked(out, seconds=0))
        except TimeoutError:
            raise ValueError(
                f"another marlin-gen convert writes to {out}: wait for it, or name another folder"
            ) from None
        parts = _parts(source.units, shard_bytes)
        names = _shard_names(len(parts))
        report = Report(out)
        done = 0
        for index, (name, units) in enumerate(zip(names, parts, strict=True)):
            path = out / name
            identity = _identity(source, units, [index, len(parts), keep_unsupported, str(dtype)])
            said = about(path)
            if said is not None and said["identity"] == identity and is_intact(path):
                report.shards_kept += 1
                done += len(units)
                on_progress(done, len(source.units), f"{name} is whole")
            else:
                (out / "config.json").unlink(missing_ok=True)
                said = _write(path, units, identity, keep_unsupported, to_layout,
                              lambda count, what, done=done: on_progress(done + count, len(source.units), what))  # type: ignore[misc]  # fmt: skip
                report.shards_written += 1
                done += len(units)
            report.formats.update(said["formats"])
            report.unheld.update(said["unheld"])
        for stale in set(path.name for path in out.glob("*.safetensors")) - set(names):
            (out / stale).unlink()  # of a run with other shards; those of others were refused above
        for left in out.glob("*.part"):
            left.unlink()
        _finish(source, names, report, activations)
    return report


def _is_foreign(path: Path) -> bool:
    """Whether it is of another model, which a run would overwrite, or mix with its own."""
    if path.name == "config.json":
        try:
            return bool(json.loads(path.read_text())["quantization_config"]["quant_method"] != "marlin_gen")
        except FileNotFoundError:  # by now, by another convert
            return False
        except (ValueError, KeyError, TypeError):
            return True
    return path.suffix in (".bin", ".pt", ".pth") or (path.suffix == ".safetensors" and about(path) is None)


def _write(
    path: Path,
    units: Sequence[Unit],
    identity: str,
    keep_unsupported: bool,
    to_layout: ToLayout,
    on_unit: Callable[[int, str], None],
) -> dict[str, Any]:
    formats: dict[str, str] = {}
    unheld: dict[str, str] = {}
    with ShardWriter(path, sum(_HEADER_BYTES + 5 * len(unit.name) for unit in units) + 4096) as shard:
        for count, unit in enumerate(units, 1):
            said = _write_unit(shard, unit, to_layout)
            if isinstance(said, Unheld):
                if not keep_unsupported:
                    raise ValueError(
                        f"{unit.name}: {said.reason}. No kernel format holds this layer; with --keep-unsupported it is"
                        " written dequantised and runs on cuBLAS"
                    )
                unheld[unit.name] = said.reason
            elif said is not None:
                formats[unit.name] = said
            on_unit(count, unit.name)
            del said
        found = {"identity": identity, "formats": formats, "unheld": unheld}
        shard.finish(found)
    return found


def _write_unit(shard: ShardWriter, unit: Unit, to_layout: ToLayout) -> str | Unheld | None:
    """The format of a layer; why it has none, without its weight; None for a plain tensor."""
    value = unit.read()
    if isinstance(value, torch.Tensor):
        shard.add(unit.name, value)
        return None
    held = to_layout(value, unit.name)
    del value
    if isinstance(held, Unheld):
        shard.add(f"{unit.name}.weight", held.weight)
        return Unheld(held.weight[:0], held.reason)
    for key, tensor in QuantLinear.from_packed(held).state_dict().items():  # a bias is a plain tensor, copied as such
        shard.add(f"{unit.name}.{key}", tensor)
    return held.weight_format


def _moved(weight: QuantizedWeight, device: torch.device | str) -> QuantizedWeight:
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "minima", "order")}
    moved = {name: None if part is None else part.to(device) for name, part in parts.items()}
    return replace(weight, **moved)  # type: ignore[arg-type]


def _finish(source: Source, names: Sequence[str], report: Report, dtype: torch.dtype) -> None:
    """The index, what is copied, and config.json."""
    out = report.folder
    where = {tensor: name for name in names for tensor in read_header(out / name)[0]}
    report.nbytes = sum((out / name).stat().st_size for name in names)
    if len(names) > 1:
        index = {"metadata": {"total_size": report.nbytes}, "weight_map": dict(sorted(where.items()))}
        write_text(out / "model.safetensors.index.json", json.dumps(index, indent=1))
    else:
        (out / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in source.copied:
        temporary = out / f"{path.name}.part"
        shutil.copyfile(path, temporary)
        temporary.replace(out / path.name)
    if source.path.suffix == ".gguf":
        from marlin_gen.convert.gguf import write_tokenizer

        report.notes.extend(note for note in [write_tokenizer(source.path, out)] if note)
    quantization = {
        "quant_method": "marlin_gen",
        "layout_version": LAYOUT_VERSION,
        "dtype": name_of(dtype),
        "formats": report.formats,
        "unheld": report.unheld,
        "source": source.quantization,
    }
    config = {key: value for key, value in source.config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"dtype": name_of(dtype), "quantization_config": quantization}
    write_text(out / "config.json", json.dumps(config, indent=1))
    if report.unheld:
        listed = "; ".join(f"{name} ({reason})" for name, reason in report.unheld.items())
        count = len(report.unheld)
        warnings.warn(f"{count} layers are in {dtype}, for no kernel format holds them: {listed}", stacklevel=3)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(units: Sequence[Unit], shard_bytes: int) -> list[list[Unit]]:
    """Units in their order, cut before a part would exceed ``shard_bytes``."""
    parts: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if parts[-1] and filled + unit.source_bytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += unit.source_bytes
    return parts


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


def _identity(source: Source, units: Sequence[Unit], options: list[Any]) -> str:
    """What a finished shard must have been made of to be kept."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    parts = [(unit.name, unit.source_bytes, unit.is_layer) for unit in units]
    made_of = [LAYOUT_VERSION, source.quantization, files, parts, options]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
