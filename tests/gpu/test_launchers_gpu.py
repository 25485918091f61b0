"""The native launcher on a GPU: that it runs, that it computes what the Python one does, and where it must not run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from test_op_gpu import activations, checked, weight

import marlin_gen
from marlin_gen import cuda_op, native
from marlin_gen.layout import PackedWeight
from marlin_gen.problem import Problem
from marlin_gen.reference import gemm_reference

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 4096), (6144, 4096), (64, 128), (4096, 14336)]


@pytest.fixture
def library() -> native.Native:
    found = native.library()
    if found is None:
        pytest.skip("no native launcher here: no C++ compiler, or MARLIN_GEN_LAUNCHER=python")
    return found


@pytest.fixture
def python_launcher(monkeypatch) -> None:
    from marlin_gen import op

    monkeypatch.setattr(cuda_op, "direct", lambda: None)
    monkeypatch.setattr(op, "_direct", None)


def by_python(a: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    return cuda_op.serve(a, packed.weight, packed.scales, None, packed.weight_format, packed.layout_version)


def partition(a: torch.Tensor, packed: PackedWeight) -> str:
    from marlin_gen.serve import Server

    choice = Server.of(a.device).choice(Problem(packed.n, packed.k, a.shape[0], packed.weight_format))
    return f"{choice.plan.config.family} {choice.plan.config.partition}"


@pytest.mark.parametrize("m", [1, 7, 16, 17, 64, 100, 300, 1000, 4096])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_both_launchers_compute_the_same_bits(library, n, k, m):
    _, _, packed = weight(n, k)
    a = activations(m, k)
    expected = by_python(a, packed)
    before = library.launches()
    for i in range(3):
        assert torch.equal(checked(a, packed), expected), i
    assert library.launches() == before + 3, f"native for {partition(a, packed)}"


def test_the_python_launcher_serves_alone(python_launcher):
    _, _, packed = weight(4096, 4096)
    for m in (1, 64):
        a = activations(m, 4096)
        assert torch.equal(checked(a, packed), by_python(a, packed))


def test_the_look_up_takes_less_than_100_ns(library):
    _, _, packed = weight(4096, 4096)
    marlin_gen.gemm(activations(16, 4096), packed)
    assert library.lookup_ns(Problem(4096, 4096, 16), torch.cuda.current_device()) < 100


def test_rows_that_are_apart_are_read_in_place(library):
    """Where tensor maps read A: no allocation beside the output. Other kernels copy it once."""
    _, _, packed = weight(4096, 4096)
    for m in (1, 64, 512):
        wide = activations(m, 4096 + 256)
        a = wide[:, 128 : 128 + 4096]
        expected = checked(a.contiguous(), packed)
        assert torch.equal(checked(a, packed), expected)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        c = marlin_gen.gemm(a, packed)
        grown = torch.cuda.max_memory_allocated() - held
        if partition(a, packed) in ("wgmma tiles", "wgmma clusterk"):
            assert grown <= c.nbytes + 512, f"m={m}: {grown} bytes for an output of {c.nbytes}"


VIEWS = {
    "overlapping": lambda: activations(1, 4096).expand(40, 4096),
    "transposed": lambda: activations(4096, 40).T,
    "every other": lambda: activations(40, 8192)[:, ::2],
    "not a row distance": lambda: activations(2, 30, 4096)[:, :20],
    "by 2 bytes": lambda: activations(40 * 4096 + 1)[1:].view(40, 4096),
    "rows by 6 bytes": lambda: activations(40, 4096 + 3)[:, :4096],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_that_no_kernel_reads_are_copied(view):
    _, _, packed = weight(4096, 4096)
    a = VIEWS[view]()
    assert torch.equal(checked(a, packed), checked(a.contiguous().clone(), packed))


def test_a_new_thread_has_a_context(library):
    """Threads that launch first and call nothing else of CUDA, each on a stream of its own, all at once."""
    _, _, packed = weight(4096, 14336)
    inputs = [activations(64, 14336) for _ in range(8)]
    expected = [checked(a, packed) for a in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(streams[i]):
                found = [marlin_gen.gemm(inputs[i], packed) for _ in range(50)]
            streams[i].synchronize()
            wrong.extend(i for c in found if not torch.equal(c, expected[i]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("m", [1, 64, 512])
def test_graphs_captured_natively_may_run_at_once(library, m):
    """Two graphs of one striped or plain kernel, replayed on two streams: neither shares what it writes."""
    _, _, packed = weight(4096, 14336)
    inputs = [activations(m, 14336) for _ in range(2)]
    expected = [checked(a, packed) for a in inputs]
    graphs, outputs = [], []
    for a in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([marlin_gen.gemm(a, packed) for _ in range(4)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for found, right in zip(outputs, expected, strict=True):
        assert all(torch.equal(c, right) for c in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(library):
    codes, scales, packed = weight(4096, 4096)
    there = packed.to("cuda:1")
    for m in (1, 64, 64, 1000, 1000):
        a = activations(m, 4096)
        c = marlin_gen.gemm(a.to("cuda:1"), there)
        assert c.device.index == 1 and torch.cuda.current_device() == 0
        reference = gemm_reference(a, codes, scales)
        assert (c.to("cuda:0").float() - reference).norm() / reference.norm() < 1e-3


FORK = """
import os, torch, marlin_gen
packed = marlin_gen.pack(*marlin_gen.quantize(torch.randn(256, 512))).to("cuda")
a = torch.randn(8, 512, device="cuda").half()
for _ in range(3):
    marlin_gen.gemm(a, packed)
torch.cuda.synchronize()
reader, writer = os.pipe()
if os.fork() == 0:
    try:
        marlin_gen.gemm(a, packed)
        text = "no error"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    os.write(writer, text.encode())
    os._exit(0)
os.close(writer)
print(os.fdopen(reader).read())
print(bool(marlin_gen.gemm(a, packed).isfinite().all()))
"""


@pytest.mark.parametrize("launcher", ["auto", "python"])
def test_a_forked_child_is_told_what_to_do(launcher):
    environment = os.environ | {"MARLIN_GEN_LAUNCHER": launcher}
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=80, env=environment)
    child, parent = done.stdout.strip().splitlines()
    assert child.startswith("RuntimeError: marlin_gen.gemm was called on CUDA before this process was forked"), done
    assert parent == "True"


FIRST = """
import threading, torch, marlin_gen
from marlin_gen.serve import Server
weights = [torch.randn(n, k, device="cuda") * k**-0.5 for n, k in ((4096, 4096), (6144, 4096), (28672, 4096))]
packed = [marlin_gen.pack(*marlin_gen.quantize(w)) for w in weights]
inputs = [torch.randn(m, 4096, device="cuda").half() for m in (1, 16, 64, 256)]
torch.cuda.synchronize()
start, servers, found = threading.Barrier(16), [], []

def work(i):
    a, weight = inputs[i % 4], packed[i % 3]
    with torch.cuda.stream(torch.cuda.Stream()):
        start.wait()
        results = [marlin_gen.gemm(a, weight) for _ in range(20)]
        torch.cuda.current_stream().synchronize()
    found.append((i, results))
    servers.append(Server.of(a.device))

threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
wrong = [i for i, results in found for c in results
         if not torch.equal(c, marlin_gen.gemm(inputs[i % 4], packed[i % 3]))]
print(len(found), len(set(map(id, servers))), wrong)
"""


@pytest.mark.parametrize("launcher", ["auto", "python"])
def test_first_calls_of_many_threads_at_once(launcher):
    """In a new process, where everything is made by whoever comes first: launchers, kernels, the buffers of locks."""
    environment = os.environ | {"MARLIN_GEN_LAUNCHER": launcher}
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=80, env=environment)
    assert done.stdout.strip() == "16 1 []", done
