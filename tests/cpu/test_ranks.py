"""Whether ranks resolve the same tables: the hash, and its comparison over real gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tables
import torch
from tables import A100, H100, mma, row

import marlin_gen
from marlin_gen import ranks
from marlin_gen.dispatch import Dispatcher, digest
from marlin_gen.table import DispatchTable, TableWarning

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row(4096, 4096, 1, mma()), row(4096, 4096, 16, mma(48))]


def test_the_hash_is_of_what_decides_and_not_of_where_it_lies(tmp_path):
    one = tables.table(tmp_path / "one", ROWS)
    other = tables.table(tmp_path / "other", ROWS, date="2026-09-09")
    assert digest([one]) == digest([other]) == digest([DispatchTable.load(one.folder)])
    renamed = replace(one, gpu=replace(one.gpu, name="OEM 80GB"))
    assert digest([renamed]) == digest([one])


@pytest.mark.parametrize(
    ("backend", "device", "on"),
    [
        ("gloo", None, "cpu"), ("undefined", None, "cpu"), ("cpu:gloo,cuda:nccl", 1, "cpu"), ("nccl", None, "cuda"),
        ("cuda:nccl", None, "cuda"), ("nccl", "cuda:1", "cuda:1"), ("cuda:nccl", "cpu", "cuda"),
    ],
)  # fmt: skip
def test_bytes_are_gathered_where_the_group_can(backend, device, on):
    """"undefined": of a group that was made without naming one, which has gloo for the CPU."""
    assert ranks._gathers_on(backend, device) == torch.device(on)


def test_the_hash_changes_with_anything_that_decides(tmp_path):
    one = tables.table(tmp_path / "one", ROWS)
    other = tables.table(tmp_path / "other", [row(4096, 4096, 1, mma(48)), ROWS[1]])
    artifacts = [tables.artifact(tmp_path / "again", plan, b"built again") for plan in (mma(), mma(48))]
    rebuilt = DispatchTable.build(H100, ROWS, artifacts, {}).write(tmp_path / "rebuilt", artifacts)
    fewer = replace(one, rows=one.rows[:1])
    different = [[one], [other], [one, other], [other, one], [fewer], [rebuilt], []]
    hashes = [digest(found) for found in different] + [digest([one], mma())]
    assert len(set(hashes)) == len(hashes)


def test_a_damaged_cubin_changes_the_hash(tmp_path):
    made = tables.table(tmp_path, ROWS)
    before = digest([made])
    tables.damage(made, next(iter(made.kernels)))
    with pytest.warns(TableWarning):
        assert digest([DispatchTable.load(made.folder)]) != before


def test_tables_of_other_gpus_do_not_count_on_a_gpu(tmp_path):
    mine, other = tables.table(tmp_path / "h", ROWS), tables.table(tmp_path / "a", ROWS, gpu=A100)
    assert digest(Dispatcher(H100, [other, mine]).tables) == digest([mine])


def test_without_distributed_the_check_is_the_hash(tmp_path, monkeypatch):
    tables.table(tmp_path, ROWS)
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(tmp_path))
    found = marlin_gen.check_ranks(device="cpu")
    assert found == marlin_gen.table_hash("cpu") and len(bytes.fromhex(found)) == 32
    monkeypatch.setenv("MARLIN_GEN_TABLE", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        marlin_gen.check_ranks(device="cpu")


RANK = """
import os, sys
rank, meeting, same, other, nowhere = int(sys.argv[1]), *sys.argv[2:]
import torch.distributed as dist
import json, marlin_gen
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
said = []
for tables in (same, other if rank else same, nowhere if rank else same):
    os.environ["MARLIN_GEN_TABLE"] = tables
    try:
        said.append(marlin_gen.check_ranks(device="cpu"))
    except (RuntimeError, FileNotFoundError) as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
dist.destroy_process_group()
"""


def test_two_ranks_compare_their_tables(tmp_path):
    tables.table(tmp_path / "same", ROWS)
    tables.table(tmp_path / "other", ROWS[:1])
    folders = [str(tmp_path / name) for name in ("meeting", "same", "other", "nowhere")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *folders],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), answers
    (equal_0, differ_0, broken_0), (equal_1, differ_1, broken_1) = (json.loads(out) for out, _ in answers)
    assert equal_0 == equal_1 and len(equal_0) == 64
    assert differ_0 == differ_1  # every rank says so, and the same
    assert differ_0.startswith("RuntimeError: the ranks of this job do not resolve the same marlin_gen tables:")
    assert f"{equal_0[:12]} on rank 0; " in differ_0 and " on rank 1. " in differ_0
    # A rank that has no table to hash says why; the other does not wait for it.
    assert broken_1.startswith("FileNotFoundError: MARLIN_GEN_TABLE=") and "an error on rank 1" in broken_0
