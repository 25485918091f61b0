"""The op in the contexts PyTorch puts it in, on the CPU: compiled for any m, copied, pickled, forked, threaded."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import marlin_gen
from marlin_gen.layout import PackedWeight
from marlin_gen.reference import dequantize, gemm_reference

CODES = torch.randint(0, 16, (128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SCALES = (torch.rand(128, 2, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.005).half()
PACKED = marlin_gen.pack(CODES, SCALES)
BIAS = torch.randn(128, generator=torch.Generator().manual_seed(2)).half()


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).half()


def test_compiled_for_any_m_at_most_three_times():
    """For the first m, for any m, and for m = 1, which torch takes apart."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a: marlin_gen.gemm(a * 2, PACKED, BIAS) + 1, fullgraph=True, backend=counter)
    for m in (5, 1, 7, 16, 17, 64, 100, 2, 3, 333):
        a = activations(m, 256)
        assert torch.equal(compiled(a), marlin_gen.gemm(a * 2, PACKED, BIAS) + 1)
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_compiled_with_dynamic_m_marked_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a: marlin_gen.gemm(a, PACKED), fullgraph=True, backend=counter)
    for m in (5, 7, 64, 100):
        a = activations(m, 256)
        torch._dynamo.mark_dynamic(a, 0)
        assert torch.equal(compiled(a), marlin_gen.gemm(a, PACKED))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_gradients_are_the_same_compiled():
    a, grad = activations(6, 256), activations(6, 128)
    found = []
    for f in (marlin_gen.gemm, torch.compile(marlin_gen.gemm, fullgraph=True, backend="aot_eager")):
        x, bias = a.clone().requires_grad_(), BIAS.clone().requires_grad_()
        f(x, PACKED, bias).backward(grad)
        found.append((x.grad, bias.grad))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))
    expected = grad.float() @ dequantize(CODES, SCALES).float()
    assert (found[0][0].float() - expected).norm() / expected.norm() < 1e-3
    assert torch.allclose(found[0][1].float(), grad.float().sum(0), rtol=1e-2, atol=1e-2)


def test_bias_is_added_before_rounding():
    a = activations(7, 256)
    assert torch.equal(marlin_gen.gemm(a, PACKED, BIAS), (gemm_reference(a, CODES, SCALES) + BIAS).half())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_with_a_bias(requires_grad):
    operands = (activations(3, 256).requires_grad_(requires_grad), PACKED.weight, PACKED.scales, BIAS)
    torch.library.opcheck(torch.ops.marlin_gen.gemm.default, operands)


@pytest.mark.parametrize("bias", [BIAS.float(), BIAS[:64], BIAS.to("meta"), BIAS.view(1, 128)])
def test_a_bias_that_does_not_fit_is_named(bias):
    with pytest.raises(ValueError, match=r"bias is torch\.\w+ \[.*\] on \w+; it must be torch.float16 \[128\] on cpu"):
        marlin_gen.gemm(activations(2, 256), PACKED, bias)


def test_inference_mode():
    a = activations(4, 256)
    expected = marlin_gen.gemm(a, PACKED)
    with torch.inference_mode():
        c = marlin_gen.gemm(a, PACKED)
        assert c.is_inference() and torch.equal(c, expected)
        ones = torch.ones(2, 256).half()
        assert ones.is_inference() and torch.equal(marlin_gen.gemm(ones, PACKED), marlin_gen.gemm(ones.clone(), PACKED))


def test_a_packed_weight_is_copied_and_pickled_whole():
    a = activations(4, 256)
    copies = [copy.deepcopy(PACKED), copy.copy(PACKED), pickle.loads(pickle.dumps(PACKED))]
    for other in copies:
        assert isinstance(other, PackedWeight)
        assert (other.weight_format, other.layout_version) == (PACKED.weight_format, PACKED.layout_version)
        assert torch.equal(marlin_gen.gemm(a, other), marlin_gen.gemm(a, PACKED))
    assert copies[0].weight.data_ptr() != PACKED.weight.data_ptr()


def test_a_module_is_copied_pickled_and_saved_whole():
    layer, a = marlin_gen.QuantLinear.from_packed(PACKED, BIAS), activations(4, 256)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    for other in others:
        assert torch.equal(other(a), layer(a)) and other.weight.data_ptr() != layer.weight.data_ptr()
    others[0].weight.zero_()
    assert not torch.equal(others[0](a), layer(a)), "a copy has a weight of its own"


def test_threads_at_once():
    inputs = [torch.full((m, 256), float(m)).half() for m in range(1, 9)]
    expected = [marlin_gen.gemm(a, PACKED) for a in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(10) if not torch.equal(marlin_gen.gemm(inputs[i], PACKED), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_computes_on_the_cpu():
    a = activations(4, 256)
    expected = marlin_gen.gemm(a, PACKED)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(torch.equal(marlin_gen.gemm(a, PACKED), expected)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork, whoever uses it
    try:
        child.start()
        child.join(60)
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0 and answers.get()


def test_make_fx_and_fake_tensors_see_one_op():
    from torch.fx.experimental.proxy_tensor import make_fx

    operands = (activations(3, 256), PACKED.weight, PACKED.scales, BIAS)
    graph = make_fx(lambda a, w, s, b: marlin_gen.gemm(a, PackedWeight(w, s), b), tracing_mode="fake")(*operands)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "marlin_gen.gemm.default" in targets
    assert torch.equal(graph(*operands), marlin_gen.gemm(operands[0], PACKED, BIAS))


def test_the_eager_shortcut_has_shapes_too():
    """Whoever traces it all the same gets a graph that can be made and run."""
    operands = [t.to("meta") for t in (activations(3, 256), PACKED.weight, PACKED.scales)]
    assert torch.ops.marlin_gen.gemm_no_grad(*operands, None, 0).shape == (3, 128)
