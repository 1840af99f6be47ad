"""Every private name of torch that this package uses, each with the public way beside it.

`torch.library.register_autograd` attaches a derivative through the dispatcher, which then sees a
call twice, and it knows neither forward mode nor `torch.func`. With private names a call on plain
tensors ends at once in what serves it, which `adatape-kernels bench dispatch` measures against the
public way, and dual tensors and transforms are noticed; and where nobody else would see a call of
the op, its kernel is called in its place. Where torch lacks one of these names, the public way
serves, which refuses forward mode.

A private function also makes a size that is known only when an op has run, in a graph that the
public one would end.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

PRIVATE_NAMES = (
    "DispatchKeySet",
    "_after_autograd_keyset",
    "_AutoDispatchBelowAutograd",
    "_any_requires_grad",
    "_are_functorch_transforms_active",
    "_functorch",
    "_dynamo",
    "_dispatch_tls_local_include_set",
    "_dispatch_tls_is_dispatch_key_excluded",
    "_is_torch_function_mode_enabled",
    "_autograd",
)
"""Members of torch._C that the fast path needs."""

SINGLE_LEVEL = isinstance(vars(torch.autograd.Function)["apply"], classmethod)
"""Whether an autograd function can be applied for one transform of torch.func alone.

From torch 2.14 on `apply` is no Python any more, and starts with the outermost transform always.
"""

Directly = Callable[[Callable[..., Any], tuple], Any]
"""Takes a kernel of the CPU, one of those that `refuse_ended_transforms` is about, and its
arguments. Returns the kernel's results with their derivative, or None where the op has to be
called."""

PlainTorch = Callable[[tuple, Any], Any]
"""Takes an op's arguments and its results, and returns the results computed by torch's own ops; the
op's results say what has no derivative, such as the indices that were selected."""


def missing_names() -> tuple[str, ...]:
    """Return the private names that this torch does not have."""
    return tuple(name for name in PRIVATE_NAMES if not hasattr(torch._C, name))


def take_back(library: torch.library.Library) -> None:
    """Remove all that was registered with a library.

    By public means it happens when nothing refers to the library any more, which the kernels in it
    do for ever.
    """
    destroy = getattr(library, "_destroy", None)
    if destroy is None:
        raise RuntimeError(
            "adatape_kernels: expected to be imported once in a process with this torch, got twice"
        )
    destroy()


def transforms_active() -> bool:
    """Return whether a transform of torch.func, such as vmap, is at work; False if unknown."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def reverse_mode_alone() -> bool:
    """Return whether no transform of torch.func and no forward mode is at work.

    True in a graph that `torch.compile` traces, which makes its own way through both.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return getattr(forward_ad, "_current_level", -1) < 0 and not transforms_active()


class _Declined(Exception):
    """A kernel that was called in the place of its op did not take its arguments."""


def _look_for_observers() -> Callable[[], bool]:
    """Return what `unobserved` is."""
    if missing_names():
        return lambda: False
    keys, of = torch._C.DispatchKey, torch._C.DispatchKeySet
    # The keys that torch adds to a call where nothing is at work; inference mode leaves one out.
    always = of(keys.BackendSelect).raw_repr()
    ordinary = frozenset((always, always | of(keys.ADInplaceOrView).raw_repr()))
    included = torch._C._dispatch_tls_local_include_set
    function_mode = torch._C._is_torch_function_mode_enabled
    profiled = torch._C._autograd._profiler_enabled
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    autocast = torch._C.DispatchKey.AutocastCPU  # out of every call unless autocast is on
    return lambda: (
        included().raw_repr() in ordinary
        and not function_mode()
        and not profiled()
        and excluded(autocast)
        and forward_ad._current_level < 0
    )


unobserved = _look_for_observers()
"""Returns whether nothing but autograd and a kernel has a part in the calls of this thread.

Nothing records a graph of them or profiles them, no mode and no transform sees them, no autocast
may have a rule for them, and there are no tangents. Then a call of an op differs from one of its
kernel by its time alone. Whether `torch.compile` traces is to be asked in its own words, which it
takes for a constant: `torch.compiler.is_compiling()`.
"""


def refuse_ended_transforms(library: Any, name: str) -> None:
    """Have a kernel's op refuse tensors of a transform of torch.func that has ended.

    Torch would give the kernel what such a tensor wraps, whose gradient autograd would not see.

    Args:
        library: takes kernels for the op's namespace.
        name: the op's, without the namespace.
    """

    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"{name}: expected tensors of no transform that has ended, got one")

    if not missing_names():  # without them its kernel is never called in the place of an op
        library.impl(name, untraced(refuse), "FuncTorchGradWrapper")


def bare(overload: Any) -> Callable[..., Any]:
    """Return what an op's overload calls with the arguments that it gets."""
    return getattr(overload, "_op", overload)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in a form that `torch.compile` leaves alone, with all that it calls.

    A kernel that runs between two graphs, or in a backward pass, is a Python frame like any other,
    which the compiler would otherwise try to trace.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except AttributeError:
        return torch.compiler.disable(function)
    return function


def dynamic_size() -> int:
    """Return the size, known only when an op has run, that its fake gives to a result.

    `torch.library.get_ctx().new_dynamic_size()` ends the graph of a plain `torch.compile`, and
    makes a size only with `fullgraph=True` or with a flag that the user has to set.
    """
    context: Any = torch.library.get_ctx()
    shapes = getattr(context, "_shape_env", None)
    allocate = getattr(torch._library.fake_impl, "allocate_size", None)
    if shapes is None or allocate is None:
        return context.new_dynamic_size()
    return allocate(shapes)


def attach_fast(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    plain_torch: PlainTorch | None,
    composed: bool,
    instead: Callable[[], Callable[..., Any] | None] | None,
) -> Directly:
    """Attach the derivative of an op to the dispatcher's key for autograd.

    The arguments are those of `attach_derivative.attach`.

    Returns:
        What calls a kernel in the place of the op, where nothing observes it.
    """
    below, any_requires_grad = torch._C._AutoDispatchBelowAutograd, torch._C._any_requires_grad
    transforms = torch._C._are_functorch_transforms_active
    below_autograd = _below_autograd(library, name, run, instead)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        if callable(keys):  # a kernel that is called in the place of the op
            try:
                output = keys(*args)
            except Exception as error:
                raise _Declined from error
        elif transforms():
            # Autograd is off in here for this transform only; those around it see the call as well.
            with below(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below_autograd(keys, args)
        else:
            with below():
                output = below_autograd(keys, args)
        setup_context(ctx, args, output)
        return output

    def forward_with_tangents(ctx: Any, keys: Any, *args: Any) -> Any:
        output = forward(ctx, keys, *args)
        ctx.call = args, output
        return output

    def tangents(ctx: Any, *of_arguments: Any) -> Any:
        (args, output), ctx.call = ctx.call, None
        if plain_torch is None:
            raise NotImplementedError(
                f"{name}: expected no dual tensors, as it has no tangents, got one"
            )
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            computed = plain_torch(args, output)
            if isinstance(output, torch.Tensor):
                single = computed if isinstance(computed, torch.Tensor) else computed[0]
                return _tangent_or_zero(single, output)
            return tuple(map(_tangent_or_zero, computed, output))

    def derivative(ctx: Any, *grads: Any) -> Any:
        return None, *backward(ctx, *grads)  # None is the gradient of `keys`

    functions = {"forward": staticmethod(forward), "backward": staticmethod(untraced(derivative))}
    differentiable: Any = type(f"adatape_{name}", (torch.autograd.Function,), functions)
    functions |= {"forward": staticmethod(forward_with_tangents), "jvp": staticmethod(tangents)}
    dual: Any = type(f"adatape_{name}_dual", (torch.autograd.Function,), functions)

    def autograd(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(args):
            function = dual
        elif torch.is_grad_enabled() and any_requires_grad(*args):
            function = differentiable
        else:
            return below_autograd(keys, args)
        if composed and (function is dual or transforms()):
            return run(*args)
        if not transforms():
            return function.apply(keys, *args)
        if not SINGLE_LEVEL:
            raise NotImplementedError(
                f"{name}: expected torch.autograd, or torch.func on a torch before 2.14, got a "
                f"transform of torch.func on torch {torch.__version__}"
            )
        return _at_one_level(function, keys, args)

    library.impl(name, untraced(autograd), "Autograd", with_keyset=True)
    # The class's own `apply` is slower: it would look for tensors of transforms that have ended.
    single: Any = super(torch.autograd.Function, differentiable)
    apply = single.apply if SINGLE_LEVEL else differentiable.apply
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    by_autograd = torch._C.DispatchKey.AutogradOther  # never alone: with those of every device
    records = torch.is_grad_enabled

    def directly(kernel: Callable[..., Any], args: tuple) -> Any:
        if records() and any_requires_grad(*args):
            if excluded(by_autograd):
                return None
            try:
                return apply(kernel, *args)
            except _Declined:  # nothing else, such as what a hook for saved tensors raises
                return None
        try:
            return kernel(*args)
        except Exception:
            return None

    return directly


def _below_autograd(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    instead: Callable[[], Callable[..., Any] | None] | None,
) -> Callable[[Any, tuple], Any]:
    """Return what makes a call, by the dispatcher's keys for it, once autograd has had its turn."""
    op = getattr(getattr(torch.ops, library.ns), name).default
    below, after_autograd = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    plain = _plain_keys()

    def below_autograd(keys: Any, args: tuple) -> Any:
        keys = keys & after_autograd
        if keys.raw_repr() in plain:
            return run(*args)
        other = None if instead is None else instead()
        with below():
            return op.redispatch(keys, *args) if other is None else other(*args)

    return below_autograd


def attach_in_place(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    instead: Callable[[], Callable[..., Any] | None] | None,
) -> None:
    """Have the dispatcher's key for autograd refuse an op where a derivative is asked for.

    The op works in place; the arguments are those of `attach_derivative.attach`.
    """
    below_autograd = _below_autograd(library, name, run, instead)
    any_requires_grad = torch._C._any_requires_grad

    def autograd(keys: Any, *args: Any) -> Any:
        dual = forward_ad._current_level >= 0 and _has_tangent(args)
        if dual or (torch.is_grad_enabled() and any_requires_grad(*args)):
            raise NotImplementedError(
                f"{name}: expected tensors that ask for no gradient, as it works in place, got one"
            )
        results = below_autograd(keys, args)
        if not args[0].is_inference():  # as what another op has saved may be this tensor
            torch.autograd.graph.increment_version(args[0])
        return results

    library.impl(name, untraced(autograd), "Autograd", with_keyset=True)


def _has_tangent(args: tuple) -> bool:
    return any(isinstance(arg, torch.Tensor) and _tangent(arg) is not None for arg in args)


def _tangent(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return None
    return forward_ad.unpack_dual(tensor).tangent


def _tangent_or_zero(computed: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor | None:
    """Return a result's tangent; None for integers, which have none."""
    if not result.is_floating_point():
        return None
    tangent = _tangent(computed)
    return torch.zeros_like(result) if tangent is None else tangent.to(result.dtype)


def _at_one_level(function: Any, keys: Any, args: tuple) -> Any:
    """Apply a function for the transform that the dispatcher is at, as torch's own kernels do.

    `torch.autograd.Function.apply` would start with the outermost transform once more.
    """
    single = torch._C._functorch
    allowed = single.get_single_level_autograd_function_allowed()
    single.set_single_level_autograd_function_allowed(True)
    try:
        return super(torch.autograd.Function, function).apply(keys, *args)
    finally:
        single.set_single_level_autograd_function_allowed(allowed)


@functools.cache
def _plain_keys() -> frozenset[Any]:
    """Return the keys of calls in which nothing but one device's kernel is left to dispatch to.

    No mode wants to see such a call, and there is no subclass and no transform.
    """
    plain = set()
    for device in ("CPU", "CUDA"):
        with contextlib.suppress(AttributeError):
            key = getattr(torch._C.DispatchKey, device)
            plain.add(torch._C.DispatchKeySet(key).raw_repr())
    return frozenset(plain)
