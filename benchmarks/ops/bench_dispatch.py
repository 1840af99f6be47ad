"""What each op costs on an input so small that only its overhead is left.

    adatape-kernels bench dispatch

"ours" calls the public function, which on a CPU goes past the op to its kernel with such a call;
"ours, with a gradient" does so with tensors that require one. "ours, op alone" calls the op, whose
derivative is attached through private names of torch (ops/fast_autograd.py). "ours, public
autograd" calls a twin of that op, whose derivative `torch.library.register_autograd` attaches. On a
GPU calls follow each other without waiting, so that the host's time a call is what shows. "ours,
Triton's launcher" is what the implementation in Triton does beside Triton's own part of a launch:
it allocates and chooses tiles, on any device, and nothing is launched. The same of the backward is
"ours, Triton's backward launcher".
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels import ElasticBatch, ops, use_backend
from adatape_kernels.benchmarks.harness.cases import (
    ANY_BACKEND,
    OURS,
    BenchmarkCase,
    Prepared,
    Provider,
    Skipped,
)
from adatape_kernels.benchmarks.harness.suites import Selection, Suite, for_reading, shape_text
from adatape_kernels.ops import FFN, triton_runtime
from adatape_kernels.ops.attach_derivative import attach
from adatape_kernels.ops.op import operation

OPS = (
    "tape_select",
    "tape_gather",
    "tape_read",
    "elastic_attention",
    "varlen_attention",
    "dual_ffn",
    "add_layer_norm",
    "compact_rows",
    "accumulate_rows",
)
CALLED_BY = {
    "tape_read": ("tape_select", "tape_gather"),
    "varlen_attention": ("elastic_attention",),
}
"""What runs where a function is no op with implementations of its own."""
OP_ALONE, PUBLIC = f"{OURS}, op alone", f"{OURS}, public autograd"
WITH_GRADIENT = f"{OURS}, with a gradient"
LAUNCHER, BACKWARD_LAUNCHER = f"{OURS}, Triton's launcher", f"{OURS}, Triton's backward launcher"


class DispatchedOp(str):
    """The name of an op."""

    meaning = f"one of {', '.join(OPS)}"

    def __new__(cls, value: object) -> "DispatchedOp":
        text = super().__new__(cls, value)
        if text not in OPS:
            raise ValueError(value)
        return text


class DispatchShape(NamedTuple):
    op: DispatchedOp = DispatchedOp(OPS[0])


def tiny(
    op: str, device_type: str, dtype: torch.dtype, *, gradients: bool = False
) -> Callable[[], Tensor]:
    """Return a call of the op on a few numbers, which returns the op's first result."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_(gradients)

    torch.manual_seed(0)
    with torch.device(device_type):
        query, keys = made(1, 8), made(1, 4, 8)
        q, padded = made(2, 1, 8), made(1, 2, 8)
        ffn = FFN(made(8, 8), made(8), made(8, 8), made(8))
        keep, weights = torch.ones(2, dtype=torch.bool), torch.ones(2)
        source = torch.arange(2, dtype=torch.int32)
    options = {"num_tape_tokens": 1, "topk": 1, "halt_threshold": 1.0}
    selection = ops.tape_select(query, keys, **options)
    x = ElasticBatch.from_padded(padded)
    read = (selection.indices, selection.weights.detach(), selection.counts)
    offsets = x.cu_inputs, x.cu_tapes
    return {
        "tape_select": lambda: ops.tape_select(query, keys, **options).weights,
        "tape_gather": lambda: ops.tape_gather(keys, *read, capacity=1)[0],
        "tape_read": lambda: ops.tape_read(query, keys, capacity=1, **options)[0],
        "elastic_attention": lambda: ops.elastic_attention(q, q, q, *offsets),
        "varlen_attention": lambda: ops.varlen_attention(q, q, q, x.cu_inputs),
        "dual_ffn": lambda: ops.dual_ffn(x.data, 2, ffn),
        "add_layer_norm": lambda: ops.add_layer_norm(x.data, x.data, ffn.b1, ffn.b2)[0],
        "compact_rows": lambda: ops.compact_rows(x.data, keep, *offsets, capacity=2)[0],
        "accumulate_rows": lambda: ops.accumulate_rows(x.data, x.data, source, weights),
    }[op]


class _Seen(Exception):
    """The op whose arguments are sought was called, and shall not run."""


class _SeenArguments(TorchDispatchMode):
    """Notes the arguments with which an op of torch is called inside, and stops there."""

    def __init__(self, overload: Any):
        super().__init__()
        self.overload = overload
        self.arguments: tuple[Any, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.overload:
            self.arguments = args
            raise _Seen
        return function(*args, **(kwargs or {}))


def _arguments_of(op: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """Return what the public function, in a call, gives to the op below it."""
    with contextlib.suppress(_Seen), _SeenArguments(operation(op).overload) as seen:
        call()
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in seen.arguments)


_public_library = torch.library.Library("adatape_public", "DEF")


@functools.cache
def public_twin(op: str) -> Any:
    """Declare an op with the schema and the implementations of ours, and a public derivative.

    The calls that are timed record no gradient, so the derivative is never computed.
    """
    ours = operation(op)
    _public_library.define(ours.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _public_library.impl(op, ours._run, "CompositeExplicitAutograd")

    def no_derivative(*args: Any) -> Any:
        raise NotImplementedError(f"{op}: expected a call that records no gradient")

    attach(_public_library, op, ours._run, no_derivative, no_derivative, public=True)
    return getattr(torch.ops.adatape_public, op).default


def public_function(call: Callable[[], Tensor]) -> Prepared:
    """Prepare a call of the public function."""
    return Prepared(call, lambda found: [found])


def with_gradient(
    op: str, device_type: str, dtype: torch.dtype
) -> Callable[[Callable[[], Tensor]], Prepared]:
    """Return a provider that makes the same call on tensors that require gradients."""

    def prepare(_: Callable[[], Tensor]) -> Prepared:
        call = tiny(op, device_type, dtype, gradients=True)
        return Prepared(call, lambda found: [found.detach()])

    return prepare


def below_function(op: str, overload: Any) -> Callable[[Callable[[], Tensor]], Prepared]:
    """Return a provider that calls an op of torch as the public function calls ours."""

    def prepare(call: Callable[[], Tensor]) -> Prepared:
        arguments = _arguments_of(op, call)
        return Prepared(
            lambda: overload(*arguments),
            lambda found: [found if isinstance(found, Tensor) else found[0]],
        )

    return prepare


@functools.cache
def backward_arguments(op: str, device_type: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return what a backward pass behind a tiny call gives to the backward op."""
    call = tiny(op, device_type, dtype, gradients=True)
    return _arguments_of(f"{op}_bwd", lambda: call().sum().backward())


def launcher_of(
    op: str, arguments_of: Callable[[Callable[[], Tensor]], tuple[Any, ...]]
) -> Callable[[Callable[[], Tensor]], Prepared]:
    """Return a provider that calls what launches the op's Triton kernels, without launching."""

    def prepare(call: Callable[[], Tensor]) -> Prepared:
        if not triton_runtime.INSTALLED:
            raise Skipped("triton is not installed")
        launcher = operation(op).implementations["triton"].function
        arguments = arguments_of(call)

        def run() -> None:
            with triton_runtime.recording():
                launcher(*arguments)

        return Prepared(run, lambda found: [])

    return prepare


def below(op: str, device_type: str, dtype: torch.dtype) -> list[Provider]:
    """Return the providers that call what lies below the public function."""

    def of_backward(_: Any = None) -> tuple[Any, ...]:
        return backward_arguments(op, device_type, dtype)

    alone, twin = below_function(op, operation(op).overload), below_function(op, public_twin(op))
    forward = launcher_of(op, functools.partial(_arguments_of, op))
    backward = launcher_of(f"{op}_bwd", of_backward)
    return [
        Provider(OP_ALONE, alone, ANY_BACKEND, graph=False),
        Provider(PUBLIC, twin, ANY_BACKEND, graph=False),
        Provider(LAUNCHER, forward, checked=False, graph=False),
        Provider(BACKWARD_LAUNCHER, backward, checked=False, graph=False),
    ]


def case(
    shape: DispatchShape, direction: str, dtype: torch.dtype, device_type: str
) -> BenchmarkCase:
    op = str(shape.op)

    def reference(call: Callable[[], Tensor]) -> list[Tensor]:
        with use_backend("eager"):
            return [call()]

    def inputs() -> Callable[[], Tensor]:
        if op not in CALLED_BY:
            # A provider that called ops of ours for it would not be what its name says.
            backward_arguments(op, device_type, dtype)
        return tiny(op, device_type, dtype)

    providers = [
        Provider(OURS, public_function, ANY_BACKEND, graph=False),
        Provider(WITH_GRADIENT, with_gradient(op, device_type, dtype), ANY_BACKEND, graph=False),
    ]
    if op not in CALLED_BY:
        providers += below(op, device_type, dtype)
    return BenchmarkCase(
        op=SUITE.op,
        direction=direction,
        dtype=dtype,
        shape=shape_text(shape),
        device_type=device_type,
        inputs=inputs,
        reference=reference,
        providers=providers,
        flops=0,
        bytes=0,
        measured_ops=list(CALLED_BY.get(op, (op,))),
        sets=1,
    )


def shapes(device_type: str) -> Selection:
    every = [f"op={op}" for op in OPS]
    return Selection(every, every, every)


SUITE = Suite(
    op="dispatch",
    shape=DispatchShape,
    directions=("forward",),
    providers=[OURS, WITH_GRADIENT, OP_ALONE, PUBLIC, LAUNCHER, BACKWARD_LAUNCHER],
    shapes=shapes,
    dtypes=for_reading,
    case=case,
)
