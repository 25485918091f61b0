"""``convert``: a quantised checkpoint to safetensors in the packed layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marlin_gen.cli.console import note, out, print_json
from marlin_gen.cli.progress import counted_progress


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder (GPTQ, AWQ, compressed-tensors, HQQ, fp8) or .gguf file.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write; a stopped run is taken up.")],
    keep_unsupported: Annotated[
        bool, typer.Option("--keep-unsupported", help="Layers that no kernel format holds: dequantised, not an error.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where layers are repacked, one at a time: cpu, cuda:0, ...")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations, float16 or bfloat16; default: the scales', exactly.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Size of the files, in GB of the checkpoint.", min=0.001)] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Convert a quantised checkpoint to the packed layout, exactly; transformers loads the result."""
    import torch

    from marlin_gen.convert import convert as convert_checkpoint

    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in types:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(types)}")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        raise ValueError(f"--device {device} is neither cpu nor a GPU that torch finds here, as cuda:0") from error
    try:
        with counted_progress("convert") as show:
            report = convert_checkpoint(
                source, folder, keep_unsupported, device, types.get(dtype or ""), int(shard_gb * 1e9), show
            )
    except ImportError as error:  # of the hf extra; its message says how to get it
        raise ValueError(str(error)) from error
    counts: dict[str, int] = {}
    for name in report.formats.values():
        counts[name] = counts.get(name, 0) + 1
    if json:
        print_json({
            "folder": str(report.folder), "formats": report.formats, "unheld": report.unheld, "nbytes": report.nbytes,
            "shards_written": report.shards_written, "shards_kept": report.shards_kept, "notes": report.notes,
        })  # fmt: skip
        return
    for said in report.notes:
        note(said)
    layers = ", ".join(f"{count} layers in {name}" for name, count in sorted(counts.items())) or "no packed layer"
    more = f", {len(report.unheld)} dequantised" if report.unheld else ""
    kept = f" ({report.shards_kept} found whole)" if report.shards_kept else ""
    shards = report.shards_written + report.shards_kept
    out.print(f"{layers}{more}; {report.nbytes / 1e9:.2f} GB in {shards} file{'s' * (shards > 1)}{kept}")
    out.print(f"written to {report.folder}", markup=False, soft_wrap=True)
