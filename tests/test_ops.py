"""Fused operations: schema, fake, gradients and flops, each against the aten operations it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import geofx.ops as ops
from geofx.ops import fused_op


def numbers(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def strided(*shape: int) -> Tensor:
    return numbers(*shape[::-1], grad=False).permute(*range(len(shape))[::-1]).detach().requires_grad_()


X = (2, 5, 12)
CASES = {
    "low_rank": (ops.LOW_RANK_LINEAR, lambda: (numbers(*X), numbers(7, 3), numbers(3, 12), numbers(7))),
    "low_rank without bias": (ops.LOW_RANK_LINEAR, lambda: (numbers(*X), numbers(7, 3), numbers(3, 12))),
    "low_rank of rank 1": (ops.LOW_RANK_LINEAR, lambda: (numbers(12), numbers(7, 1), numbers(1, 12))),
    "low_rank strided": (ops.LOW_RANK_LINEAR, lambda: (strided(*X), strided(7, 3), strided(3, 12))),
    "low_rank without rows": (ops.LOW_RANK_LINEAR, lambda: (numbers(0, 12), numbers(7, 3), numbers(3, 12))),
    "low_rank frozen": (
        ops.LOW_RANK_LINEAR,
        lambda: (numbers(*X), numbers(7, 3, grad=False), numbers(3, 12), numbers(7, grad=False)),
    ),
    "low_rank bfloat16": (
        ops.LOW_RANK_LINEAR,
        lambda: tuple(numbers(*shape, dtype=torch.bfloat16) for shape in (X, (7, 3), (3, 12))),
    ),
    "gauge_fixed": (ops.GAUGE_FIXED_LINEAR, lambda: (numbers(*X), numbers(3, 12), numbers(4, 3))),
    "gauge_fixed within": (
        ops.GAUGE_FIXED_LINEAR,
        lambda: (numbers(*X), numbers(3, 12), numbers(4, 3), numbers(7), None, 2),
    ),
    "gauge_fixed at places": (
        ops.GAUGE_FIXED_LINEAR,
        lambda: (
            numbers(*X),
            numbers(3, 12),
            numbers(4, 3),
            numbers(7),
            torch.tensor([4, 0, 6, 1, 2, 3, 5], dtype=torch.int32),
        ),
    ),
    "block_diagonal": (
        ops.BLOCK_DIAGONAL_LINEAR,
        lambda: (numbers(*X), numbers(2, 5, 6), numbers(3, 4, 4), numbers(10)),
    ),
    "tensor_train": (
        ops.TENSOR_TRAIN_LOOKUP,
        lambda: (torch.arange(6).view(2, 3), [numbers(1, 2, 3, 2), numbers(2, 2, 2, 3), numbers(3, 2, 2, 1)]),
    ),
    "token_mps": (
        ops.TOKEN_MPS_LOOKUP,
        lambda: (torch.tensor([[3, 0], [1, 1]]), numbers(5, 30), [1, 3, 3, 1], [2, 2, 2], 7),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_check_of_torch_holds(name: str) -> None:
    op, make = CASES[name]
    results = torch.library.opcheck(op.overload, make())
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_chain(name: str) -> None:
    op, make = CASES[name]
    gradients = []
    for run in (op, op.chain):
        given = make()
        leaves = [part for part in torch.utils._pytree.tree_leaves(given) if isinstance(part, Tensor)]
        wanted = [part for part in leaves if part.requires_grad]
        y = run(*given)
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
        gradients.append([y, *torch.autograd.grad((y * weights).sum(), wanted)])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["low_rank", "gauge_fixed within", "block_diagonal", "token_mps"])
def test_compiled_without_graph_breaks(name: str) -> None:
    op, make = CASES[name]
    given = make()
    compiled = torch.compile(lambda *parts: op(*parts), backend="aot_eager", fullgraph=True)
    y = compiled(*given)
    assert torch.equal(y, op.chain(*given))
    y.sum().backward()
    expected = make()
    op.chain(*expected).sum().backward()
    leaf = next(i for i, part in enumerate(given) if isinstance(part, Tensor) and part.requires_grad)
    torch.testing.assert_close(given[leaf].grad, expected[leaf].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_chain(name: str) -> None:
    op, make = CASES[name]
    counts = []
    for run in (op, op.chain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(*make())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert counts[0] > 0 or "without rows" in name


def test_without_triton_the_chain_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    op, make = CASES["low_rank"]
    monkeypatch.setattr(fused_op.importlib.util, "find_spec", lambda name: None)
    fused_op.has_triton.cache_clear()
    given = [part.detach() for part in make()]
    for _ in range(2):
        assert torch.equal(op._on_cuda(*given), op.chain(*given))
    assert [record.getMessage() for record in caplog.records] == [
        "Triton is not installed: geofx operations run as the aten operations they stand for"
    ]
    monkeypatch.undo()
    fused_op.has_triton.cache_clear()


class Kernels:
    """Stands for the launch of a kernel: counts calls, and fails where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error
        monkeypatch.setattr(fused_op, "has_triton", lambda: True)
        monkeypatch.setattr(fused_op.FusedOp, "launch", lambda op: self)

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return args[0]


def fresh(name: str) -> tuple[fused_op.FusedOp, list]:
    op, make = CASES[name]
    return op, [part.detach() if isinstance(part, Tensor) else part for part in make()]


def test_row_88_a_kernel_that_fails_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    op, given = fresh("low_rank")
    monkeypatch.setattr(op, "failure", None)
    kernels = Kernels(monkeypatch, RuntimeError("out of resource: shared memory\nand more"))
    for _ in range(2):
        assert torch.equal(op._on_cuda(*given), op.chain(*given))
    assert kernels.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "geofx::low_rank_linear runs as aten operations, its kernel fails: "
        "RuntimeError: out of resource: shared memory"
    ]


def test_row_89_memory_that_runs_out_is_no_failure_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    op, given = fresh("low_rank")
    Kernels(monkeypatch, torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        op._on_cuda(*given)
    assert op.failure is None


def test_shapes_and_devices_are_checked_before_a_kernel_reads_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    op, (x, left, right, bias) = fresh("low_rank")
    kernels = Kernels(monkeypatch)
    for wrong in (
        (x, left, right[:, :-1], bias),
        (x, left[:, :-1], right, bias),
        (x, left, right, bias[:-1]),
    ):
        with pytest.raises(RuntimeError):
            op._on_cuda(*wrong)
    with pytest.raises(RuntimeError, match="geofx::low_rank_linear: tensors are on cpu and meta"):
        op._on_cuda(x, left, right.to("meta"), bias)
    assert kernels.calls == 0
    op._on_cuda(x, left, right, bias)
    monkeypatch.setattr(op, "chain", lambda *args: pytest.fail("checked twice"))
    op._on_cuda(x, left, right, bias)
    assert kernels.calls == 2


@pytest.mark.parametrize("name", ["low_rank", "gauge_fixed at places", "block_diagonal"])
def test_gradients_have_gradients(name: str) -> None:
    op, make = CASES[name]
    given = [
        part.detach().double().requires_grad_() if isinstance(part, Tensor) and part.requires_grad else part
        for part in make()
    ]
    assert torch.autograd.gradgradcheck(lambda *parts: op(*parts), given)


def test_gradients_under_autocast_are_those_of_the_chain() -> None:
    op, make = CASES["low_rank"]
    found = []
    for run in (op, op.chain):
        given = [part.detach().requires_grad_() for part in make()]
        given[0] = given[0].detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(*given)
        found.append([y, *torch.autograd.grad(y.float().sum(), given)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_under_autocast_the_chain_decides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    op, given = fresh("low_rank")
    kernels = Kernels(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert op._on_cuda(*given).dtype == torch.bfloat16
        assert kernels.calls == 0
        op._on_cuda(*(part.bfloat16() for part in given))
    assert kernels.calls == 1


def test_gradients_without_storage() -> None:
    given = [part.to("meta").requires_grad_() for part in fresh("low_rank")[1]]
    ops.low_rank_linear(*given).sum().backward()
    assert [part.grad.shape for part in given] == [part.shape for part in given]


def test_mixed_dtypes_run_as_the_chain_would(monkeypatch: pytest.MonkeyPatch) -> None:
    op, make = CASES["low_rank"]
    monkeypatch.setattr(type(op), "launch", lambda self: pytest.fail("launched"))
    x, *others = (part.detach() for part in make())
    with pytest.raises(RuntimeError, match="dtype"):
        op._on_cuda(x.double(), *others)
    doubles = [part.double() for part in (x, *others)]
    assert torch.equal(op._on_cuda(*doubles), op.chain(*doubles))
