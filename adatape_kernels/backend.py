"""Which implementation serves an op: the registry, the choice, and `use_backend`.

`define_op` declares an op `adatape::name` once. Implementations register under the name of a
backend, and each call takes the first backend in the device's order that serves the tensor, or the
one that `use_backend` names. The choice is made when the op runs, not when it is traced, so a
compiled graph honours the `use_backend` around its call.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from adatape_kernels import _triton
from adatape_kernels._build import build_facts

BACKENDS = ("eager", "cpp", "triton", "cuda")

# Fastest first. The eager reference serves every device, so it closes each list. CUDA C++ stands
# behind Triton until rows of data from a GPU say for which ops it should not.
_PREFERENCE = {"cpu": ("cpp", "eager"), "cuda": ("triton", "cuda", "eager")}

_facts = build_facts()
# A library of tests (tests/cuda_host), by which the CUDA kernels serve CPU tensors.
if "ADATAPE_CUDA_HOST" in os.environ:
    torch.ops.load_library(os.environ["ADATAPE_CUDA_HOST"])
_ABSENT = {
    "cpp": _facts.get("why", "the compiled part has no such kernel"),
    "triton": "this version has no such kernel" if _triton.INSTALLED else "triton is not installed",
    "cuda": _facts.get("why", _facts.get("cuda", "").removeprefix("none: ")),
}

if not _facts.get("cuda", "none").startswith("none"):
    _ABSENT["cuda"] = "the compiled part has no such kernel"

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One backend's function for one op, with the devices (None: all) and dtypes that it serves."""

    function: Callable[..., Any]
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Return why a tensor cannot be served, or None when it can."""
        if self.devices is not None and device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}"
        return None


_library = torch.library.Library("adatape", "DEF")
_implementations: dict[str, dict[str, Implementation]] = {}
# Each op's function below autograd.
_runs: dict[str, Callable[..., Any]] = {}
# Of calls in which nothing but one device's kernel is left to be dispatched to: no mode that wants
# to see the op, no subclass, no transform.
_PLAIN = {
    torch._C.DispatchKeySet(key).raw_repr()
    for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
}
# What `choose` found: by op, forced backend, device type and dtype.
_chosen: dict[tuple[str, str | None, str, torch.dtype], Callable[..., Any]] = {}


class _Forced(threading.local):
    backend: str | None = None


_forced = _Forced()


def define_op(schema: str, fake: Callable[..., Any]) -> Any:
    """Declare `adatape::<schema>` with its fake and return the op.

    The op's first argument, a tensor, decides device and dtype. `register` adds implementations.
    """
    name = schema[: schema.index("(")]
    _implementations[name] = {}
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        tensor = args[0]
        key = (name, _forced.backend, tensor.device.type, tensor.dtype)
        return (_chosen.get(key) or choose(name, tensor))(*args)

    _runs[name] = run
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adatape::{name}", fake, lib=_library)
    return getattr(torch.ops.adatape, name).default


def define_composed(schema: str, function: Callable[..., Any]) -> Any:
    """Declare `adatape::<schema>` as a function that calls other ops of ours, and return the op.

    It needs no implementation of its own, only a derivative that differs from what they compose to.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _runs[name] = function
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adatape::{name}", function, lib=_library)
    return getattr(torch.ops.adatape, name).default


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach the derivative of `adatape::<name>`.

    Where nothing is forced around the backward, as on the threads that autograd has for a GPU, it
    runs on the backend that was forced around the forward.

    `torch.library.register_autograd` would do, but goes through the dispatcher a second time; here
    a call on plain tensors ends at once in what serves it (benchmarks/bench_dispatch.py).
    """
    op, run = getattr(torch.ops.adatape, name).default, _runs[name]

    def below_autograd(keys: Any, args: tuple) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        if keys.raw_repr() in _PLAIN:
            return run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys, *args)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = below_autograd(keys, args)
        ctx.forced_backend = _forced.backend
        setup_context(ctx, args, output)
        return output

    def derivative(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        with use_backend(_forced.backend or ctx.forced_backend):
            return None, *backward(ctx, *grads)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    differentiable: Any = type(f"adatape_{name}", (torch.autograd.Function,), functions)

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable.apply(keys, *args)
        return below_autograd(keys, args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def register(
    op: str,
    backend: str,
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> Callable[[Callable], Callable]:
    """Make the decorated function the implementation of `op` in `backend`."""

    def decorate(function: Callable) -> Callable:
        _implementations[op][backend] = Implementation(function, devices, dtypes)
        _chosen.clear()
        return function

    return decorate


def register_compiled(op: str) -> None:
    """Serve `op` on the CPU by the compiled part's op of the same name, if it is there."""
    if _facts["compiled"] != "yes":
        return
    function = _with_value_errors(op, getattr(torch.ops.adatape_cpu, op).default)
    register(op, "cpp", devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))(function)


def _with_value_errors(op: str, function: Callable) -> Callable:
    """C++ has no ValueError to throw through torch, nor the op's name at hand for the message."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if ": expected " in message:
                raise ValueError(f"{op}: {message}") from None
            raise

    return run


def register_triton(op: str) -> Callable[[Callable], Callable]:
    """Make the decorated launcher serve `op` on CUDA, and in triton's interpreter on the CPU."""
    if not _triton.INSTALLED:
        return lambda launcher: launcher
    return register(op, "triton", devices=_triton.DEVICES, dtypes=_triton.DTYPES)


def cuda_devices(op: str) -> tuple[str, ...]:
    """Return for which devices csrc/cuda has `op`: "cuda" where it is linked, "cpu" in tests."""
    keys = {"cuda": "CUDA", "cpu": "CPU"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    exists = hasattr(torch.ops.adatape_cuda, op)
    return tuple(d for d in keys if exists and has_kernel(f"adatape_cuda::{op}", keys[d]))


def register_cuda(
    op: str, devices: tuple[str, ...] | None = None
) -> Callable[[Callable], Callable]:
    """Make the decorated function serve `op` on the devices, None for those of its C++ kernels."""
    devices = cuda_devices(op) if devices is None else devices
    if not devices:
        return lambda function: function
    half_or_float = (torch.float32, torch.float16, torch.bfloat16)
    decorate = register(op, "cuda", devices=devices, dtypes=half_or_float)
    return lambda function: decorate(_with_value_errors(op, function))


def beside_cuda(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """Return what serves the shapes that `op` in CUDA C++ does not: Triton, else the reference."""
    found = _implementations[op]
    triton = found.get("triton")
    if triton is None or triton.refusal(tensor.device.type, tensor.dtype):
        return found["eager"].function
    return triton.function


def registered_ops() -> tuple[str, ...]:
    """Return the names of the declared ops, backward ones included."""
    return tuple(_implementations)


def current_backend() -> str | None:
    """Return the backend that `use_backend` forces on this thread, or None."""
    return _forced.backend


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every op on this thread from one backend: eager, cpp, triton or cuda.

    None restores the default, the fastest implementation that serves the tensor.

    Raises:
        ValueError: the name is none of the four.
        RuntimeError: the backend has no implementation in this installation.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"use_backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name is not None and not any(name in found for found in _implementations.values()):
        raise RuntimeError(f"use_backend: backend {name!r} is not available: {_ABSENT[name]}")
    previous, _forced.backend = _forced.backend, name
    try:
        yield
    finally:
        _forced.backend = previous


def choose(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """Return the function that serves `op` for this tensor.

    Raises:
        RuntimeError: the forced backend does not serve the op, the device or the dtype.
    """
    device_type, dtype = tensor.device.type, tensor.dtype
    for backend in (_forced.backend,) if _forced.backend else _preference(device_type):
        implementation = _implementations[op].get(backend)
        if implementation and not implementation.refusal(device_type, dtype):
            _chosen[op, _forced.backend, device_type, dtype] = implementation.function
            return implementation.function
    wanted = _forced.backend or "every backend"
    reasons = explain(op, device_type, dtype)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason != "serves")
    raise RuntimeError(f"{op}: {wanted} cannot serve {dtype} on {device_type} ({why})")


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return one backend's function for an op, whatever the device; it takes the op's arguments.

    Raises:
        RuntimeError: the backend has none in this installation.
    """
    found = _implementations[op].get(backend)
    if found is None:
        raise RuntimeError(f"{op}: backend {backend!r} has no implementation: {_ABSENT[backend]}")
    return found.function


def serving(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the backend that serves `op` by default for such a tensor."""
    reasons = explain(op, device_type, dtype)
    return next((b for b in _preference(device_type) if reasons[b] == "serves"), None)


def explain(op: str, device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Return for each backend "serves", or why it does not serve `op` for such a tensor."""
    reasons = {}
    for backend in BACKENDS:
        implementation = _implementations[op].get(backend)
        if implementation is None:
            reasons[backend] = _ABSENT[backend]
        else:
            reasons[backend] = implementation.refusal(device_type, dtype) or "serves"
    return reasons


def _preference(device_type: str) -> tuple[str, ...]:
    return _PREFERENCE.get(device_type, ("eager",))
