"""Two GPUs: from one process, from two threads, and a rank on each over NCCL. Skipped where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shipped import tables

import marlin_gen
from marlin_gen.layout import PackedWeight
from marlin_gen.reference import gemm_reference

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("cuda:0", "cuda:1")
SHAPES = [(4096, 4096), (192, 384), (4096, 14336)]
TOKENS = (1, 16, 100, 1000)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")]


@pytest.fixture(autouse=True)
def first_device_again() -> Iterator[None]:
    yield
    torch.cuda.set_device(0)


Case = tuple[dict[str, torch.Tensor], dict[str, PackedWeight], torch.Tensor]  # a and weight by device; what it gives


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Operands on both GPUs, and the result of the first, held to the fp32 reference."""
    made = []
    generator = torch.Generator("cuda:0").manual_seed(0)
    for n, k in SHAPES:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda:0", generator=generator)
        scales = (torch.rand(n, k // 128, device="cuda:0", generator=generator) * 0.02 + 0.005).half()
        packed = {device: marlin_gen.pack(codes, scales).to(device) for device in DEVICES}
        for m in TOKENS:
            a = torch.randn(m, k, device="cuda:0", generator=generator).half()
            c, reference = marlin_gen.gemm(a, packed["cuda:0"]), gemm_reference(a, codes, scales)
            assert (c.float() - reference).norm() / reference.norm() < 1e-3
            made.append(({device: a.to(device) for device in DEVICES}, packed, c.cpu()))
    for device in DEVICES:
        torch.cuda.synchronize(device)  # threads use streams of their own
    return made


@pytest.mark.parametrize("current", [0, 1])
def test_both_give_the_same_bits_and_the_current_device_stays(cases, current):
    torch.cuda.set_device(current)
    for _ in range(3):  # by Python, then natively
        for a, packed, expected in cases:
            for device in DEVICES:
                c = marlin_gen.gemm(a[device], packed[device])
                assert c.device == torch.device(device) and torch.cuda.current_device() == current
                assert torch.equal(c.cpu(), expected), (device, expected.shape)


def test_two_threads_that_use_both(cases):
    """Each begins with another device, and sets none; each has a stream on each."""
    wrong: list[str] = []
    together = threading.Barrier(2)

    def work(index: int) -> None:
        try:
            together.wait(30)
            streams = {device: torch.cuda.Stream(device) for device in DEVICES}
            for i in range(60):
                device = DEVICES[(i + index) % 2]
                a, packed, expected = cases[i % len(cases)]
                with torch.cuda.stream(streams[device]):
                    c = marlin_gen.gemm(a[device], packed[device])
                    if not torch.equal(c.cpu(), expected):
                        wrong.append(f"thread {index}, {device}, {tuple(expected.shape)}")
                if torch.cuda.current_device() != 0:
                    wrong.append(f"thread {index}: the current device became {torch.cuda.current_device()}")
        except Exception as error:
            wrong.append(f"thread {index}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong, wrong


def test_a_graph_on_the_second(cases):
    a, packed, expected = cases[1]
    x, weight = a["cuda:1"].clone(), packed["cuda:1"]
    marlin_gen.gemm(x, weight)
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            c = marlin_gen.gemm(x, weight)
        for _ in range(3):
            c.fill_(float("nan"))
            graph.replay()
            assert torch.equal(c.cpu(), expected)


def test_operands_on_two_gpus_are_refused(cases):
    a, packed, _ = cases[0]
    for first, second in (DEVICES, DEVICES[::-1]):
        with pytest.raises(ValueError, match=rf"a is on {first}, weight on {second}.*move all to one device"):
            marlin_gen.gemm(a[first], packed[second])


# Of a rank: what check_ranks says with equal tables, with others on rank 1, and with none there; then how far a
# tensor-parallel pair of layers is from the whole one. No device is made the current one: it is named in each call.
RANK = """
import json, os, sys
rank, backend, device, meeting, other, nowhere = int(sys.argv[1]), *sys.argv[2:]
import torch, torch.distributed as dist
import marlin_gen
dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
said = []
for table in (None, other if rank else None, nowhere if rank else None):
    if table:
        os.environ["MARLIN_GEN_TABLE"] = table
    try:
        said.append(marlin_gen.check_ranks(device=device))
    except (RuntimeError, FileNotFoundError) as error:
        said.append(f"{type(error).__name__}: {error}")
    os.environ.pop("MARLIN_GEN_TABLE", None)
errors = {}
with torch.no_grad():
    for has_bias in (False, True):
        torch.manual_seed(0)
        up, down = torch.nn.Linear(1024, 4096, bias=has_bias), torch.nn.Linear(4096, 1024, bias=has_bias)
        whole = [marlin_gen.QuantLinear.from_float(layer).to(device) for layer in (up, down)]
        parts = [whole[0].shard(rank, 2, "rows"), whole[1].shard(rank, 2, "columns")]
        for m in (1, 16, 300):
            x = torch.randn(m, 1024).half().to(device)
            expected = whole[1](torch.relu(whole[0](x)))
            c = parts[1](torch.relu(parts[0](x)))
            dist.all_reduce(c)
            errors[f"{m} {has_bias}"] = float((c.float() - expected.float()).norm() / expected.float().norm())
print(json.dumps([said, errors]))
dist.destroy_process_group()
"""


def test_a_rank_on_each_over_nccl(tmp_path):
    """The environment goes along, NCCL's own settings with it."""
    mine = tables()[0]
    shutil.copytree(mine.folder, tmp_path / "other")
    fewer = replace(mine, rows=mine.rows[:-1], folder=tmp_path / "other")
    fewer.write(tmp_path / "other")
    folders = [str(tmp_path / name) for name in ("meeting", "other", "nowhere")]
    environment = {name: value for name, value in os.environ.items() if name != "MARLIN_GEN_TABLE"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "nccl", DEVICES[rank], *folders],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        answers = [rank.communicate(timeout=75) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), answers
    ((equal, differ, broken), errors), ((equal_1, differ_1, broken_1), errors_1) = (
        json.loads(said.splitlines()[-1]) for said, _ in answers
    )
    assert equal == equal_1 and len(equal) == 64
    assert differ == differ_1 and differ.startswith("RuntimeError: the ranks of this job do not resolve the same")
    assert f"{equal[:12]} on rank 0; " in differ and " on rank 1. " in differ
    assert broken_1.startswith("FileNotFoundError: MARLIN_GEN_TABLE=") and "an error on rank 1" in broken
    assert max(*errors.values(), *errors_1.values()) < 2e-3, (errors, errors_1)
