"""Whether all ranks of a job choose kernels by the same tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from marlin_gen import dispatch, installed

if TYPE_CHECKING:
    from marlin_gen.arch import Gpu

_NONE = "00" * 32  # in place of a sha256: this rank has none


def table_hash(device: torch.device | str | int | None = None) -> str:
    """sha256 (hex, 64 characters) of the tables by which ``device`` chooses its kernels, in their order.

    Equal on two ranks exactly if they resolve the same rows to the same intact kernels. ``device``: a CUDA device
    (default: the current one), for which all tables of its architecture count; on a machine without a GPU, or for
    "cpu", all tables found do. Raises FileNotFoundError when MARLIN_GEN_TABLE holds no table, ValueError for a GPU
    that is too old.
    """
    tables, forced = installed.find_tables(), dispatch.forced_plan()
    gpu = _gpu(device)
    return dispatch.digest(dispatch.Dispatcher(gpu, tables).tables if gpu else tables, forced)


def _gpu(device: torch.device | str | int | None) -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    chosen = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
    if chosen.type != "cuda":
        return None
    from marlin_gen.driver import identify

    return identify(chosen.index if chosen.index is not None else torch.cuda.current_device())


def _gathers_on(backend: str, device: torch.device | str | int | None) -> torch.device:
    """Where a group gathers: with NCCL alone on the rank's own GPU, the current one or ``device``."""
    if "nccl" not in backend or "cpu:" in backend:
        return torch.device("cpu")
    asked = torch.device("cuda" if device is None else device)
    return asked if asked.type == "cuda" else torch.device("cuda")


def check_ranks(group: Any = None, device: torch.device | str | int | None = None) -> str:
    """``table_hash``, compared over the ranks of ``group`` (default: all) of torch.distributed; every rank calls it.

    Ranks of unlike tables choose other kernels, whose sums round otherwise and whose times differ. Raises a
    RuntimeError, on every rank, that names the ranks that differ. Where torch.distributed is not initialised there is
    nothing to compare.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return table_hash(device)
    failure: Exception | None = None
    try:
        mine = table_hash(device)
    except Exception as error:  # the other ranks wait for this one's answer all the same
        mine, failure = _NONE, error
    # As bytes: gathering objects would unpickle what other ranks send.
    on = _gathers_on(str(distributed.get_backend(group)), device)
    own = torch.tensor(list(bytes.fromhex(mine)), dtype=torch.uint8, device=on)
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, own, group=group)
    if failure is not None:
        raise failure
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(everyone):
        name = distributed.get_global_rank(group, rank) if group is not None else rank
        ranks.setdefault(bytes(found.tolist()).hex(), []).append(name)
    if len(ranks) > 1:
        parts = (
            f"{'an error' if found == _NONE else found[:12]} on rank{'s' * (len(at) > 1)} {', '.join(map(str, at))}"
            for found, at in ranks.items()
        )
        raise RuntimeError(
            f"the ranks of this job do not resolve the same marlin_gen tables: {'; '.join(parts)}. Give all of them the"
            " same MARLIN_GEN_TABLE and marlin_gen version (marlin-gen show and marlin-gen diff tell tables apart)"
        )
    return mine
