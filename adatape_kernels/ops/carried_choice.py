"""The choices of a compiled forward pass, carried to its backward pass.

The two are graphs of ops, without the contexts that ops have in eager mode. So while torch traces,
an op `adatape_carrying::present` joins the forward pass. It returns the number of what is chosen
when it runs, as the stride of an empty tensor: that lies on the graph's device, takes no memory and
no copy to the host, and has a shape that is known beforehand, which CUDA graphs ask for. The graph
keeps the tensor for the backward pass. There it is an argument of the ops, which are those of the
namespace `adatape_carrying`: each is an op of `adatape` that runs under the choices it is given.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops import fast_autograd
from adatape_kernels.ops.choice import Choice, recorded
from adatape_kernels.ops.registration import Namespace, kept


class _Carried(NamedTuple):
    choice: Choice[Any]
    gives_way: bool


_namespace = Namespace("adatape_carrying")
_carried: dict[str, _Carried] = kept("carried", dict)
_numbers: dict[tuple[tuple[str, Any], ...], int] = kept("numbers of choices", dict)
_lock = threading.Lock()
_tags = (torch.Tag.pt2_compliant_tag,)
_present: Choice[Tensor | None] = Choice(None)
"""What the forward pass has handed to the backward pass that torch traces on this thread."""

UNKNOWN = 1
"""The stride of a tensor that something copied, such as a hook that saves tensors elsewhere."""


def carry(name: str, choice: Choice[Any], *, gives_way: bool) -> None:
    """Carry a choice to compiled backward passes.

    Args:
        name: a name that no other choice has.
        choice: the choice.
        gives_way: whether it gives way to one that is made around the backward pass.
    """
    _carried[name] = _Carried(choice, gives_way)


def present(like: Any) -> Tensor | None:
    """Return what stands for the present choices in the graph being traced; None without a graph.

    Args:
        like: a tensor on the graph's device.
    """
    if type(like) is Tensor or type(like) is torch.nn.Parameter or not recorded():
        return None
    if torch.compiler.is_exporting() or fast_autograd.transforms_active():
        return None
    return torch.ops.adatape_carrying.present(like.device)


def handed_over(carried: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a backward pass is traced whose forward pass got `carried`."""
    return contextlib.nullcontext() if carried is None else _present.only(carried)


def declare_carrying(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declare, for an op that `run` serves, the one that runs under the choices it is given."""
    name = schema[: schema.index("(")]

    def run_carrying(*args: Any, carried: Tensor) -> Any:
        with _restored(carried):
            return run(*args)

    def fake_carrying(*args: Any, carried: Tensor) -> Any:
        return fake(*args)

    _namespace.define(schema.replace(") ->", ", *, Tensor carried) ->"), _tags)
    library = _namespace.kernels_of(name)
    library.impl(name, fast_autograd.untraced(run_carrying), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_namespace.name}::{name}", fake_carrying, lib=library)


def carrying(name: str) -> Callable[..., Any] | None:
    """Return what takes the place of an op in the backward pass that is traced, or None."""
    carried = _present.value
    if carried is None:
        return None
    overload = getattr(torch.ops.adatape_carrying, name).default
    return lambda *args: overload(*args, carried=carried)


def _number(device: torch.device) -> Tensor:
    """Return the number of the present choices, for good, as the stride of an empty tensor."""
    chosen = tuple((name, each.choice.value) for name, each in _carried.items())
    with _lock:
        number = _numbers.setdefault(chosen, UNKNOWN + 1 + len(_numbers))
    return torch.empty_strided((0,), (number,), device=device)


def _fake_number(device: torch.device) -> Tensor:
    return torch.empty_strided((0,), (UNKNOWN,), device=device)


@contextlib.contextmanager
def _restored(carried: Tensor) -> Iterator[None]:
    """Choose what was chosen when a number was taken."""
    number = carried.stride(0)
    chosen = () if number == UNKNOWN else next(c for c, n in _numbers.items() if n == number)
    with contextlib.ExitStack() as stack:
        for name, value in chosen:
            choice, gives_way = _carried[name]
            if not (gives_way and choice.value is not None):
                stack.enter_context(choice.only(value))
        yield


_namespace.define("present(Device device) -> Tensor", _tags)
_library = _namespace.kernels_of("present")
_library.impl("present", fast_autograd.untraced(_number), "CompositeExplicitAutograd")
torch.library.register_fake("adatape_carrying::present", _fake_number, lib=_library)
