"""The native launcher beside the Python one: CPU tensors, a driver that records. test_native.py runs this file."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import pytest
import tables
import torch

import marlin_gen
from marlin_gen import cuda_op, driver, first_use, gather, native, op, serve, toolchain
from marlin_gen.arch import ARCHS
from marlin_gen.config import KernelSpec, Plan
from marlin_gen.dispatch import Dispatcher
from marlin_gen.families import FAMILIES
from marlin_gen.families.defaults import ptx_plan
from marlin_gen.formats import FORMATS
from marlin_gen.launch import Kernel, Launcher, Workspace
from marlin_gen.layout import PackedWeight
from marlin_gen.problem import Problem
from marlin_gen.serve import Server, ServeWarning
from marlin_gen.shipped_ptx import ShippedPtx, shipped_ptx

N, K = 256, 512
GPU = fake_gpu.FakeGpu(Path(__file__).parent / "libcuda.so.1")  # cases.py is copied beside it


@pytest.fixture(scope="session")
def launcher_and_library():
    with pytest.MonkeyPatch.context() as patch:
        GPU.pretend(patch)
        patch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        made, found = Launcher(0), native.library()
        made.workspace._device = torch.device("cpu")
        assert found is not None
        found.implement("gemm_no_grad", "CPU")
        found.set_test_stream(fake_gpu.STREAM)
        slow = torch.library.Library("marlin_gen", "IMPL")
        slow.impl("gemm_slow", cuda_op.slow, "CPU")
        yield made, found, slow


@pytest.fixture
def server(launcher_and_library, monkeypatch, tmp_path) -> Server:
    """A server with a table of one wgmma and one mma plan, as the only one of device 0."""
    launcher, found, _ = launcher_and_library
    rows = [tables.row(N, K, 2, tables.mma(32)), tables.row(N, K, 64, tables.wgmma(64))]
    made = Server(0, launcher, Dispatcher(tables.H100, [tables.table(tmp_path, rows)]))
    for plan, m in ((tables.mma(32), 2), (tables.wgmma(64), 64)):
        shape = FAMILIES.of(plan.config).launch_shape(plan, Problem(N, K, m), 132, 132)
        GPU.announce(plan.config.family, fake_gpu.argument_sizes(shape))
    monkeypatch.setattr(serve, "_server", lambda index: made)
    made.launch_natively(found)
    return made


def packed(n: int = N, k: int = K, fmt: str = "u4b8g128") -> PackedWeight:
    """Random words: nothing is decoded here."""
    row = FORMATS[fmt]
    weight = torch.randint(0, 1 << 30, (n // 64, k // 64, 128 * row.bits), dtype=torch.int32)
    return PackedWeight(weight, torch.rand(n // 64, row.scale_rows(k), 64 * row.scale_values).half(), fmt)


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def call(a: torch.Tensor, w: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return op._cuda(a, w.weight, w.scales, bias, w.weight_format, w.layout_version)


def all_launches() -> list[tuple[Plan, Problem]]:
    found = []
    for family in FAMILIES.rows.values():
        for fmt in FORMATS.values():
            for config in family.defaults(ARCHS["sm_90a"], fmt):
                for m in (1, config.block_m, 3 * config.block_m + 5):
                    problem = Problem(1024, 2048, m, fmt.name, "bf16" if fmt.group_size == 64 else "f16")
                    if family.reject_problem(config, problem) is None:
                        found.append((Plan(config, family.rasters(config, problem)[0]), problem))
    return found


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_both_launchers_hand_the_driver_the_same_bytes(launcher_and_library, strided, dependent):
    """Every default plan of every family and format, full and partial token tiles, rows side by side or apart; in bf16
    and with a bias here and there."""
    launcher, library, _ = launcher_and_library
    cases = all_launches()
    assert {plan.config.partition for plan, _ in cases} >= {"tiles", "clusterk", "striped"}
    for plan, problem in cases:
        spec = KernelSpec(plan.config, problem.weight_format, problem.act_dtype, "sm_90a")
        shape = FAMILIES.of(plan.config).launch_shape(plan, problem, 132, 132 // plan.config.cluster_size)
        if strided and "a" in shape.operands:
            continue
        kernel = Kernel(
            spec, driver.Function(GPU.function(*fake_gpu.argument_sizes(shape)), None), 132 // plan.config.cluster_size
        )
        dtype = torch.bfloat16 if problem.act_dtype == "bf16" else torch.float16
        a = torch.zeros(problem.m, problem.k + 8 * strided, dtype=dtype)[:, : problem.k]
        w = packed(problem.n, problem.k, problem.weight_format)
        w = replace(w, scales=w.scales.to(dtype))
        bias = torch.zeros(problem.n, dtype=dtype) if problem.m % 2 else None
        locks = torch.zeros(max(shape.num_locks, 1), dtype=torch.int32)
        library.put_locks(0, fake_gpu.STREAM, locks.data_ptr(), locks.numel())
        smem_bytes = kernel.shape(plan, problem, 132)[1][dependent]
        library.put_step(problem, 0, kernel.function.handle, shape, smem_bytes, dependent)
        before = library.launches()
        code = native.FORMAT_CODES[problem.weight_format]
        c = torch.ops.marlin_gen.gemm_no_grad(a, w.weight, w.scales, bias, code)
        assert library.launches() == before + 1, "the native launcher ran"
        ours = GPU.latest()
        found = fake_gpu.split(ours, shape)
        partials = int.from_bytes(found.get("partials", b""), "little")
        assert bool(partials) == bool(shape.partials_bytes) and partials % 16 == 0
        launcher.run_with(
            kernel, plan, problem, a, w.weight, w.scales, c,
            SimpleNamespace(data_ptr=lambda partials=partials: partials), locks if shape.num_locks else None,
            bias, dependent=dependent,
        )  # fmt: skip
        theirs = GPU.latest()
        assert found == fake_gpu.split(theirs, shape), plan.key
        assert bytes(ours) == bytes(theirs), plan.key
        assert c.shape == (problem.m, problem.n) and c.is_contiguous()
    library.clear_steps(0)


def test_the_first_call_is_pythons_and_the_next_ones_native(server, launcher_and_library):
    library, w = launcher_and_library[1], packed()
    for m in (1, 2, 33, 64):
        a = activations(m, K)
        before = library.launches()
        assert call(a, w).shape == (m, N) and library.launches() == before
        first = fake_gpu.split(GPU.latest(), shape_of(server, m))
        assert call(a, w).shape == (m, N) and library.launches() == before + 1
        again = fake_gpu.split(GPU.latest(), shape_of(server, m))
        for name in set(first) - {"c", "c_map"}:
            assert first[name] == again[name], name
        assert library.lookup_ns(Problem(N, K, m), 0, 1000) > 0
    with pytest.raises(KeyError):
        library.lookup_ns(Problem(N, K, 7), 0, 10)


def shape_of(server: Server, m: int):
    step = server.step(Problem(N, K, m))
    return step.kernel.shape(step.choice.plan, step.problem, 132)[0]


@pytest.mark.parametrize(
    ("make", "is_native", "shape"),
    [
        (lambda: activations(64, K), True, (64, N)),
        (lambda: activations(2, 32, K), True, (2, 32, N)),
        (lambda: activations(1, 64, 1, K), True, (1, 64, 1, N)),
        (lambda: activations(64, K + 8)[:, :K], True, (64, N)),
        (lambda: activations(2, 40, K)[:, :32], False, (2, 32, N)),  # not rows at one distance
        (lambda: activations(64, K + 2)[:, :K], False, (64, N)),  # rows that start anywhere
        (lambda: activations(K, 64).T, False, (64, N)),
        (lambda: activations(1, K).expand(64, K), False, (64, N)),
        (lambda: activations(64 * K + 1)[1:].view(64, K), False, (64, N)),
        (lambda: activations(0, K), False, (0, N)),
        (lambda: activations(1, 0, K).expand(2, 0, K), False, (2, 0, N)),
    ],
)
def test_what_a_kernel_cannot_read_is_copied_once_by_python(server, launcher_and_library, make, is_native, shape):
    library, w = launcher_and_library[1], packed()
    call(activations(64, K), w)
    a, before, launched = make(), library.launches(), GPU.launches
    assert call(a, w).shape == shape
    assert library.launches() - before == is_native and GPU.launches - launched == (a.numel() > 0)
    if a.numel():
        address, _, rows, stride = words(fake_gpu.split(GPU.latest(), shape_of(server, 64))["a_map"], 2, 3, 4, 5)
        assert rows == 64 and address % 16 == 0 and stride == (K + 8 if a.stride(-2) == K + 8 else K) * 2
        assert (address == a.data_ptr()) == is_native


def words(tensor_map: bytes, *which: int) -> list[int]:
    return [int.from_bytes(tensor_map[8 * i : 8 * i + 8], "little") for i in which]


def test_rows_apart_are_copied_for_a_kernel_that_wants_them_side_by_side(server, launcher_and_library):
    library, w = launcher_and_library[1], packed()
    call(activations(2, K), w)
    a, before = activations(2, K + 8)[:, :K], library.launches()
    call(a, w)
    pointer = int.from_bytes(fake_gpu.split(GPU.latest(), shape_of(server, 2))["a"], "little")
    assert library.launches() == before and pointer != a.data_ptr()


def test_a_bias_is_a_pointer_and_none_is_null(server, launcher_and_library):
    library, w, bias = launcher_and_library[1], packed(), activations(N)
    for m in (2, 64):
        call(activations(m, K), w)
        before = library.launches()
        for given, expected in ((bias, bias.data_ptr()), (None, 0)):
            call(activations(m, K), w, given)
            found = fake_gpu.split(GPU.latest(), shape_of(server, m))["bias"]
            assert int.from_bytes(found, "little") == expected
        assert library.launches() == before + 2
        call(activations(m, K), w, activations(N + 1)[1:])  # misaligned: Python makes a copy
        assert library.launches() == before + 2


def test_errors_of_the_native_op_are_pythons_own(server):
    w = packed()
    call(activations(2, K), w)
    for change, error, message in (
        ({"a": torch.zeros(2, K)}, TypeError, r"a is torch.float32; .* a.half\(\)"),
        ({"a": activations(2, 64)}, ValueError, "its last dimension must be k=512"),
        ({"scales": w.scales[:, :1]}, ValueError, "scales are torch.float16"),
        ({"bias": activations(3)}, ValueError, r"bias is torch.float16 \[3\]"),
        ({"weight": torch.zeros(w.weight.numel() + 1, dtype=torch.int32)[1:].view_as(w.weight)}, ValueError, "aligned"),
    ):
        operands = {"a": activations(2, K), "weight": w.weight, "scales": w.scales, "bias": None} | change
        with pytest.raises(error, match=message):
            op._cuda(*operands.values(), w.weight_format, w.layout_version)
        with pytest.raises(RuntimeError, match=message):  # whoever calls it otherwise gets the words at least
            torch.ops.marlin_gen.gemm_no_grad(*operands.values(), 0)


def test_a_launch_that_the_driver_refuses_goes_to_the_next_candidate(server, launcher_and_library):
    w = packed()
    call(activations(2, K), w)
    GPU.library.fake_fail(1, 2)  # the native launch, and Python's second try of the same plan
    with pytest.warns(ServeWarning, match="does not launch .* using the next candidate"):
        call(activations(2, K), w)
    library, before = launcher_and_library[1], launcher_and_library[1].launches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(activations(2, K), w)
    assert library.launches() == before + 1 and server.step(Problem(N, K, 2)).choice.plan == tables.wgmma(64)


def test_a_thread_without_a_context_gets_torchs(server, launcher_and_library):
    library, w = launcher_and_library[1], packed()
    call(activations(2, K), w)
    before = library.launches()
    GPU.library.fake_set_context(None)
    call(activations(2, K), w)
    assert library.launches() == before + 1 and GPU.library.fake_context() == 0xC0


class TestPtx:
    """Kernels that ship as PTX, where there is neither table nor compiler."""

    @pytest.fixture
    def untuned(self, launcher_and_library, monkeypatch) -> Server:
        launcher, found, _ = launcher_and_library

        def no_compiler():
            raise toolchain.ToolchainError("no compiler")

        monkeypatch.setattr(first_use, "find_toolchain", no_compiler)
        made = Server(0, launcher, Dispatcher(tables.H100, [], ptx=shipped_ptx()))
        monkeypatch.setattr(serve, "_server", lambda index: made)
        made.launch_natively(found)
        return made

    def announce(self, m: int):
        problem = Problem(N, K, m)
        shape = FAMILIES.rows["mma"].launch_shape(ptx_plan(problem, tables.H100), problem, 132, 132)
        GPU.announce("mma", fake_gpu.argument_sizes(shape))
        return shape

    def test_both_launchers_run_them(self, untuned, launcher_and_library):
        library, w = launcher_and_library[1], packed()
        with pytest.warns(ServeWarning, match=r"no compiler; others serve instead, such as mma-.* \(ptx\)"):
            for m in (1, 17, 100):
                shape = self.announce(m)
                before = library.launches()
                call(activations(m, K), w)
                python = GPU.latest()
                call(activations(m, K), w)
                assert library.launches() == before + 1 and untuned.step(Problem(N, K, m)).choice.origin == "ptx"
                ours, theirs = (fake_gpu.split(launch, shape) for launch in (GPU.latest(), python))
                same = [name for name in ours if name not in ("a", "c")]
                assert [ours[name] for name in same] == [theirs[name] for name in same]

    def test_they_wait_for_the_kernel_ahead(self, untuned, launcher_and_library, monkeypatch):
        """They are made for GPUs without dependent launches, and would not."""
        monkeypatch.setattr(launcher_and_library[0], "_depends", True)
        shape, w = self.announce(1), packed()
        with pytest.warns(ServeWarning):
            for _ in range(3):
                call(activations(1, K), w)
        assert GPU.latest().num_attributes == 0
        assert int.from_bytes(fake_gpu.split(GPU.latest(), shape)["dependent"], "little") == 0


class TestGather:
    """The kernel that puts activations into act-order."""

    @pytest.fixture
    def loaded(self, launcher_and_library) -> gather.Gather:
        GPU.announce("gather", [8, 8, 8, 8, 8, 4, 4, 4])
        return gather.Gather(0, shipped_ptx())

    def test_the_driver_gets_its_arguments(self, loaded):
        order, wide = torch.randperm(K), activations(200, 2 * K)
        for a, m, strides in (
            (wide[:, :K], 200, (2 * K, 1)), (wide[:3, ::2], 3, (2 * K, 2)), (activations(K), 1, (K, 1)),
            (activations(K, 7).T, 7, (1, 7)), (activations(2, 3, K), 6, (K, 1)),
        ):  # fmt: skip
            before = GPU.launches
            out = loaded.run(a, order)
            launch = GPU.latest()
            raw, rows = bytes(launch.bytes), gather.rows_per_block(m)
            assert GPU.launches == before + 1 and out.shape == a.shape and out.is_contiguous()
            assert words(raw[:40], *range(5)) == [a.data_ptr(), out.data_ptr(), order.data_ptr(), *strides]
            assert [int.from_bytes(raw[i : i + 4], "little") for i in (40, 44, 48)] == [m, K, rows]
            assert list(launch.grid) == [gather.grid(m, K), 1, 1] and list(launch.block) == [gather.THREADS, 1, 1]
            assert (launch.num_bytes, launch.num_attributes, launch.stream) == (52, 0, fake_gpu.STREAM)

    def test_what_it_cannot_do_is_left_to_torch(self, loaded, monkeypatch):
        order, before = torch.arange(K), GPU.launches
        assert loaded.run(torch.zeros(2, K), order) is None, "4 bytes"
        assert loaded.run(activations(2, 12), torch.arange(12)) is None, "no 16-byte columns"
        assert loaded.run(activations(2, K), torch.arange(K + 1)[1:]) is None, "not aligned"
        assert loaded.run(activations(0, K), order).shape == (0, K), "nothing to launch"
        assert GPU.launches == before
        monkeypatch.setattr(gather, "_gather", lambda index: loaded)
        a = torch.randn(2, K)
        assert torch.equal(gather.gather(a, order.flip(0)), a.flip(-1))

    def test_it_is_not_loaded_while_a_graph_is_captured(self, loaded, monkeypatch):
        a, order = activations(2, K), torch.arange(K)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert loaded.run(a, order) is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert loaded.run(a, order) is not None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert loaded.run(a, order) is not None, "loaded, it is captured as any kernel is"

    def test_where_it_does_not_load_torch_does_it(self, launcher_and_library, tmp_path, caplog):
        made = gather.Gather(0, ShippedPtx(tmp_path))
        assert made.run(activations(2, K), torch.arange(K)) is None
        assert made.run(activations(2, K), torch.arange(K)) is None
        assert len([r for r in caplog.records if "index_select" in r.message]) == 1


class TestStriped:
    """Locks: one buffer for the eager calls of a stream, and Python's when a stream is new or captured."""

    @pytest.fixture
    def striped(self, server, monkeypatch):
        plan = tables.wgmma(64)
        plan = replace(plan, config=replace(plan.config, partition="striped"))
        server.dispatcher.forced = plan
        shape = FAMILIES.of(plan.config).launch_shape(plan, Problem(N, K, 64), 132, 66)
        GPU.announce("wgmma", fake_gpu.argument_sizes(shape))
        return server, shape

    @pytest.fixture(autouse=True)
    def compiled(self, monkeypatch, tmp_path):
        """No compiler: any cubin will do."""
        from marlin_gen.dispatch import KernelLocation

        (tmp_path / "any.cubin").write_bytes(b"any")
        monkeypatch.setattr(
            Server, "_compiled", lambda self, spec: KernelLocation(tmp_path / "any.cubin", "symbol_of_wgmma")
        )

    def test_locks_are_of_the_stream(self, striped, launcher_and_library, monkeypatch):
        (_, shape), (launcher, library, _), w, a = striped, launcher_and_library, packed(), activations(64, K)
        seen = {}
        for stream in (0x77, 0x88):
            monkeypatch.setattr(torch.cuda, "current_stream", lambda d=None, s=stream: SimpleNamespace(cuda_stream=s))
            library.set_test_stream(stream)
            for is_native in (False, True):
                before = library.launches()
                call(a, w)
                assert library.launches() - before == is_native, stream
                locks = fake_gpu.split(GPU.latest(), shape)["locks"]
                assert GPU.latest().stream == stream and seen.setdefault(stream, locks) == locks
        library.set_test_stream(fake_gpu.STREAM)
        assert len(set(seen.values())) == 2
        assert launcher.workspace.shared_locks(0x77).numel() >= shape.num_locks

    def test_a_capture_gets_locks_of_its_own(self, striped, launcher_and_library, monkeypatch):
        (_, shape), (_, library, _), w, a = striped, launcher_and_library, packed(), activations(64, K)
        call(a, w)
        call(a, w)
        eager, before = fake_gpu.split(GPU.latest(), shape)["locks"], library.launches()
        GPU.library.fake_capture(1)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        try:
            call(a, w)
        finally:
            GPU.library.fake_capture(0)
        assert library.launches() == before and fake_gpu.split(GPU.latest(), shape)["locks"] != eager


def test_threads_launch_at_once(server, launcher_and_library):
    """Every call gets its output, while others register steps and clear them."""
    library, w = launcher_and_library[1], packed()
    wrong, stop = [], threading.Event()

    def work(m: int) -> None:
        for i in range(300):
            c = call(torch.full((m, K), float(i % 7)).half(), w)
            if c.shape != (m, N):
                wrong.append((m, c.shape))

    def clear() -> None:
        while not stop.is_set():
            library.clear_steps(0)

    threads = [threading.Thread(target=work, args=(m,)) for m in (1, 2, 33, 64)]
    other = threading.Thread(target=clear)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert not wrong


def test_launches_of_threads_are_on_their_own_streams(server, launcher_and_library, monkeypatch):
    """By the Python launcher, which writes the stream into a config before each launch."""
    launcher, w = launcher_and_library[0], packed()
    step = server.step(Problem(N, K, 64))
    mine = threading.local()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=mine.stream))
    outputs, before = {}, GPU.launches

    def work(stream: int) -> None:
        mine.stream = stream
        for _ in range(300):  # the fake driver remembers 1024 launches
            out = torch.empty(64, N).half()
            outputs[out.data_ptr(), stream] = out
            launcher.run(step.kernel, step.choice.plan, step.problem, activations(64, K), w.weight, w.scales, out)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (0x100, 0x200, 0x300)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    launches = [GPU.launch(i) for i in range(before, GPU.launches)]
    shape = shape_of(server, 64)
    places = {(words(fake_gpu.split(launch, shape)["c_map"], 2)[0], launch.stream) for launch in launches}
    assert len(launches) == 900 and places == outputs.keys()


def test_threads_on_one_stream_share_locks_that_stay(launcher_and_library):
    plan = replace(tables.wgmma(64), config=replace(tables.wgmma(64).config, partition="striped"))
    shape = FAMILIES.of(plan.config).launch_shape(plan, Problem(N, K, 64), 132, 66)
    assert shape.num_locks
    for trial in range(200):
        workspace = Workspace(torch.device("cpu"))
        barrier = threading.Barrier(4)

        def take(_: int, workspace=workspace, barrier=barrier) -> torch.Tensor:
            barrier.wait()
            return workspace.take(shape, 7)[1]

        with ThreadPoolExecutor(4) as pool:
            taken = list(pool.map(take, range(4)))
        assert {locks.data_ptr() for locks in taken} == {workspace.shared_locks(7).data_ptr()}, trial


def test_ctrl_c_while_a_kernel_is_compiled_stays_ctrl_c(server, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    w = packed()
    monkeypatch.setattr(Server, "gemm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(activations(7, K), w)
    with pytest.raises(RuntimeError, match="own error"):  # and is not found again behind another error
        raise cuda_op.raised(RuntimeError("own error"))


def test_the_public_function_takes_the_short_way_only_without_gradients(server, launcher_and_library, monkeypatch):
    """As on CUDA, with tensors that say they are there."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(op, "_direct", torch.ops.marlin_gen.gemm_no_grad.default)
    library, w = launcher_and_library[1], packed()
    a = activations(2, K).as_subclass(OnCuda)
    call(a, w)
    before = library.launches()
    marlin_gen.gemm(a, w)
    assert library.launches() == before + 1
    with torch.inference_mode():
        marlin_gen.gemm(a, w)
    assert library.launches() == before + 2
    a.requires_grad_()
    assert marlin_gen.gemm(a, w).requires_grad and library.launches() == before + 2
    with pytest.raises(ValueError, match="last dimension must be k=512"):
        marlin_gen.gemm(activations(2, 64).as_subclass(OnCuda), w)


def test_the_maps_of_the_same_tensors_are_encoded_once(server):
    w, a = packed(), activations(64, K)
    call(a, w)
    call(a, w)
    before = GPU.library.fake_num_encodings()
    for _ in range(20):
        call(a, w)
    assert GPU.library.fake_num_encodings() - before <= 20, "at most that of an output at a new address"


def test_a_remembered_map_is_of_this_very_matrix(server, launcher_and_library):
    """Views of one buffer, more than slots can keep apart: each gets its own number of rows and its own distance."""
    library, w, buffer = launcher_and_library[1], packed(), activations(402, 2 * K)
    for is_native in (False, True):
        before = library.launches()
        for m in range(3, 403):
            for a in (buffer[:m, :K], buffer.view(-1)[: m * K].view(m, K)):
                call(a, w)
                if not is_native:
                    continue
                found = fake_gpu.split(GPU.latest(), shape_of(server, m))
                assert words(found["a_map"], 2, 3, 4, 5) == [a.data_ptr(), K, m, a.stride(0) * 2]
                assert words(found["c_map"], 3, 4, 5) == [N, m, N * 2]
        assert is_native == (library.launches() - before == 2 * 400)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_child_process_says_that_cuda_does_not_survive_a_fork(server, calls):
    """Also of a parent that has only launched from Python, as each problem's first call does."""


    w, a = packed(), activations(2, K)
    for _ in range(calls):
        call(a, w)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            call(a, w)
            text = "no error"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert "RuntimeError: marlin_gen.gemm was called on CUDA before this process was forked" in pipe.read()
    call(a, w)
