"""What an op and an implementation are, and who serves a call.

An `Operation` is an op `adatape::name`: one schema, one fake, one derivative, and at most one
`Implementation` for each backend. An implementation states which calls it serves, by a function of
the call that returns None or the reason why not. Only the dispatcher, here, falls back: a call goes
to the first backend in its device's order whose statement accepts it, or to those, and to no other,
that `use_backend` names. The choice is made when the op runs, not when it is traced, so a compiled
graph honours the `use_backend` around its call.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.ops import fast_autograd
from adatape_kernels.ops.carried_choice import carry, declare_carrying
from adatape_kernels.ops.choice import Choice, Chosen
from adatape_kernels.ops.declaration import ADATAPE, declare
from adatape_kernels.ops.derivative import Derivative
from adatape_kernels.ops.device_facts import DeviceFacts, facts_for, facts_of
from adatape_kernels.ops.direct_call import direct_call
from adatape_kernels.ops.implementation import CompiledKernel, Implementation, Statement
from adatape_kernels.ops.op_checks import refuse_unfit
from adatape_kernels.ops.registration import Namespace, kept

BACKENDS = ("eager", "cpp", "triton", "cuda")

ORDER = {"cpu": ("cpp", "eager"), "cuda": ("triton", "cuda", "eager")}
"""By device, which backends a call is offered to, fastest first; other devices have eager only.

The eager reference serves every device, so it closes each list. CUDA C++ stands behind Triton until
rows of data from a GPU say for which ops it should not. On a CPU, Triton's interpreter is there to
prove kernels, never to be fast: it serves only where it is asked for.
"""


class NotServed(RuntimeError):
    """No backend that a call may go to serves it; the message says why, for each of them."""


class Ran(NamedTuple):
    """A call that was served: what ran, not what was asked for."""

    op: str
    backend: str


TypicalCalls = Mapping[str, Callable[[torch.dtype], tuple[Any, ...]]]
"""By a description in words, what makes the arguments of such a call, on the meta device."""

_compiled = {name: Namespace(name) for name in ("adatape_cpu", "adatape_cuda")}
_operations: dict[str, "Operation"] = {}

backend_choice: Choice[tuple[str, ...] | None] = kept(
    "backends", lambda: Choice[tuple[str, ...] | None](None)
)
"""The backends that calls may go to, in this order; none of them: the device's order.

None says that nothing was asked for, () that `use_backend(None)` asked for the default.
"""
carry("backends", backend_choice, gives_way=True)
_recorders: list[list[Ran]] = kept("recorders", list)


class Operation:
    """An op `adatape::name`, its implementations, and the choice among them.

    Args:
        schema: name, arguments and results, as torch's op schemas are written. The first argument,
            a tensor, decides the device and the dtype of a call.
        fake: returns empty results of the right shapes, dtypes and device.
        implementations: by backend.
        typical: calls by which `explain` and `adatape-kernels info` tell who serves what.
        check_arguments: raises ValueError for arguments that the op does not take, without a look
            at values; it is called before an implementation that does not do so itself.
        check_values: raises ValueError for values that the arguments may not have, and copies them
            to the host; it is called where they lie there anyway, on a CPU, before an
            implementation that does not look at them itself.
        int32: as in `direct_call`.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        implementations: Mapping[str, Implementation | CompiledKernel],
        *,
        typical: TypicalCalls,
        check_arguments: Callable[..., None] | None = None,
        check_values: Callable[..., None] | None = None,
        int32: Sequence[str] = (),
    ):
        self.name = schema[: schema.index("(")]
        self.schema = schema
        self.fake = fake
        self.typical = typical
        self.check_arguments = check_arguments
        self.check_values = check_values
        self.implementations: dict[str, Implementation] = {}
        for backend, given in implementations.items():
            if isinstance(given, CompiledKernel):
                given = given.bind(self.name, schema, _compiled[given.namespace])
            self.implementations[backend] = given
        self._candidates: dict[Any, tuple[_Candidate, ...]] = {}
        self._first_on_cpu: dict[Any, _Candidate] = {}
        library = ADATAPE.kernels_of(self.name)
        self.overload = declare(schema, library, self._run, fake)
        declare_carrying(schema, self._run, fake)
        self._derivative = Derivative(self.name, library, backend_choice)
        self.directly = self._derivative.attach(self._run, in_place="!)" in schema)
        ran = functools.partial(note_ran, self.name, "cpp")
        self.at_once = direct_call(self.overload, self.directly, self.kernel_for, ran, int32)
        _operations[self.name] = self

    def differentiable(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
        plain_torch: fast_autograd.PlainTorch | None = None,
    ) -> None:
        """Give the op its derivative, without which a backward pass through it raises.

        Args:
            backward: as `torch.library.register_autograd` has it.
            setup_context: likewise.
            plain_torch: the op by torch's own ops, for forward mode: as in `attach`.
        """
        self._derivative.set(backward, setup_context, plain_torch)

    def kernel_for(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """Return the kernel that serves a call, if it needs no checks before it.

        It is unknown, None, until the op has been called with such a device and dtype.
        """
        tensor = args[0]
        if not tensor.is_cpu:
            return None
        key = backend_choice.value or (), tensor.dtype
        first = self._first_on_cpu.get(key)
        if first is None:
            found = self._candidates.get((key[0], tensor.device, key[1]))
            if not found:
                return None
            first = self._first_on_cpu[key] = found[0]
        if first.limits is None:
            return first.kernel
        try:
            refused = first.limits(facts_of(tensor.device), *args)
        except Exception:
            # It reads arguments that nobody has checked yet. The op checks them, and says why.
            return None
        return None if refused is not None else first.kernel

    def replace(self, backend: str, given: Implementation | None) -> None:
        """Put another implementation in a backend's place, or take it away: for tests and trials.

        Every later call may go to it, of any thread.
        """
        if given is None:
            self.implementations.pop(backend, None)
        else:
            self.implementations[backend] = given
        self._candidates.clear()
        self._first_on_cpu.clear()

    def refusal(
        self,
        backend: str,
        args: Sequence[Any],
        device_type: str | None = None,
        facts: DeviceFacts | None = None,
        *,
        installed: bool = False,
    ) -> str | None:
        """Return why a backend does not serve a call, or None: see `Implementation.refusal`."""
        found = self.implementations.get(backend)
        if found is None:
            return "there is no such kernel"
        return found.refusal(args, device_type, facts, installed=installed)

    def serving(
        self,
        args: Sequence[Any],
        device_type: str | None = None,
        facts: DeviceFacts | None = None,
        *,
        installed: bool = False,
    ) -> str | None:
        """Return the backend that serves a call by default, None if there is none."""
        for backend in backend_order(device_type or args[0].device.type):
            if self.refusal(backend, args, device_type, facts, installed=installed) is None:
                return backend
        return None

    def _run(self, *args: Any) -> Any:
        """Serve a call: the op's only kernel below autograd."""
        try:
            return self._serve(*args)
        except (AttributeError, RuntimeError):
            # What no check looks for, because every call would pay for it.
            refuse_unfit(self.overload._schema.arguments, args)
            raise

    def _serve(self, *args: Any) -> Any:
        tensor = args[0]
        device, backends = tensor.device, backend_choice.value or ()
        key = backends, device, tensor.dtype
        candidates = self._candidates.get(key)
        if candidates is None:
            candidates = self._candidates[key] = self._candidates_for(*key)
        for candidate in candidates:
            if candidate.check_arguments is not None:
                candidate.check_arguments(*args)
            limits = candidate.limits
            if limits is None or limits(facts_of(device), *args) is None:
                break
        else:
            raise self._not_served(args)
        if candidate.check_values is not None:
            candidate.check_values(*args)
        results = candidate.function(*args)
        note_ran(self.name, candidate.backend)
        return results

    def _candidates_for(
        self, backends: tuple[str, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple["_Candidate", ...]:
        """Return the implementations that device and dtype leave, in the order of their turn."""
        found = []
        for backend in backends or backend_order(device.type):
            given = self.implementations.get(backend)
            if given is None:
                continue
            if given.refusal_by_device(device, dtype) is None:
                on_host = device.type == "cpu" and not given.checks_values
                check_values = self.check_values if on_host else None
                # What states limits or looks at values needs arguments that were checked before.
                looks = given.limits is not None or check_values is not None
                checked = given.checks_arguments and not looks
                check_arguments = None if checked else self.check_arguments
                checks = check_arguments, check_values
                found.append(
                    _Candidate(backend, given.function, given.limits, *checks, given.kernel)
                )
        return tuple(found)

    def _not_served(self, args: Sequence[Any]) -> NotServed:
        tensor, backends = args[0], backend_choice.value or ()
        why = "; ".join(f"{b}: {self.refusal(b, args)}" for b in backends or BACKENDS)
        who = " and ".join(backends) if backends else "every backend"
        return NotServed(
            f"{self.name}: {who} cannot serve {tensor.dtype} on {tensor.device.type} ({why})"
        )


class _Candidate(NamedTuple):
    """What a call needs to know of an implementation that its device and dtype allow."""

    backend: str
    function: Callable[..., Any]
    limits: Statement | None
    check_arguments: Callable[..., None] | None
    check_values: Callable[..., None] | None
    kernel: Callable[..., Any] | None


def use_backend(
    name: str | None, fallback: str | Sequence[str] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Serve every op on this thread from one backend: eager, cpp, triton or cuda.

    A call that the backend does not serve raises the reason, unless `fallback` names who takes it.
    The choice is made when an op runs: around a compiled function it governs the ops inside, while
    inside one it ends the graph, or, with fullgraph=True, compiling fails. A backward pass runs on
    what is forced around it, else on what was forced around its forward, compiled or not.

    Args:
        name: the backend; None restores the default, the fastest that serves a call.
        fallback: a backend, or several in the order of their turn, for the calls that `name` does
            not serve.

    Raises:
        ValueError: a name is none of the four or comes twice, or there is a fallback without a
            backend.
        RuntimeError: a backend has no implementation in this installation.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> with ak.use_backend("eager"):
        ...     read = ak.ops.tape_select(
        ...         torch.ones(2, 4), torch.ones(9, 4), num_tape_tokens=3, topk=2, halt_threshold=1
        ...     )
        >>> read.counts.tolist()
        [2, 2]
    """
    if not isinstance(fallback, str | list | tuple | None):
        raise ValueError(f"fallback: expected a name or a list of names, got {shown(fallback)}")
    further = (fallback,) if isinstance(fallback, str) else tuple(fallback or ())
    for given in (*(() if name is None else (name,)), *further):
        if given not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"use_backend: expected one of {known}, got {shown(given)}")
        if (reason := why_absent(given)) is not None:
            raise RuntimeError(f"use_backend: backend {given!r} is not available: {reason}")
    if name is None and further:
        raise ValueError(f"fallback: expected None without a backend, got {shown(fallback)}")
    if len({name, *further}) <= len(further):
        others = f"backends that differ from {name!r} and from each other"
        raise ValueError(f"fallback: expected {others}, got {shown(fallback)}")
    return Chosen(backend_choice, () if name is None else (name, *further), "use_backend")


def why_absent(backend: str) -> str | None:
    """Return why a backend serves no op at all in this installation, or None if it serves one."""
    found = [o.implementations.get(backend) for o in _operations.values()]
    there = [given for given in found if given is not None]
    if any(given.absent is None for given in there):
        return None
    return there[0].absent if there else "there is no such kernel"


def current_backend() -> str | None:
    """Return the backend that `use_backend` forces on this thread, or None.

    Example:
        >>> import adatape_kernels as ak
        >>> from adatape_kernels.ops.op import current_backend
        >>> with ak.use_backend("eager"):
        ...     current_backend()
        'eager'
    """
    return (backend_choice.value or (None,))[0]


def note_ran(op: str, backend: str) -> None:
    """Tell those that collect it which backend has served a call of an op."""
    if _recorders:
        for recorder in tuple(_recorders):
            recorder.append(Ran(op, backend))


@contextlib.contextmanager
def record() -> Iterator[list[Ran]]:
    """Collect which backend served each call, of every thread, in the order in which they ran."""
    ran: list[Ran] = []
    _recorders.append(ran)
    try:
        yield ran
    finally:
        # By identity: two records that hold the same are equal.
        del _recorders[next(i for i, other in enumerate(_recorders) if other is ran)]


def registered_ops() -> tuple[str, ...]:
    """Return the names of the ops that have implementations, backward ones included."""
    return tuple(_operations)


def operation(name: str) -> Operation:
    """Return an op by its name. Raises KeyError where there is none."""
    return _operations[name]


def backend_order(device_type: str) -> tuple[str, ...]:
    """Return the backends that a call on such a device is offered to, in their order."""
    return ORDER.get(device_type, ("eager",))


def explain(op: str, device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Return for each backend "serves", or why it does not serve the first typical call of an op.

    Of a device that is not here, the facts are those of `device_facts.EMULATED`.
    """
    found, facts = operation(op), facts_for(device_type)
    args = next(iter(found.typical.values()))(dtype)
    return {b: found.refusal(b, args, device_type, facts) or "serves" for b in BACKENDS}


def serving(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the backend that by default serves the first typical call of an op."""
    found = operation(op)
    args = next(iter(found.typical.values()))(dtype)
    return found.serving(args, device_type, facts_for(device_type))


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory, as typical calls are made of."""
    return torch.empty(shape, dtype=dtype, device="meta")
