"""A GPU that is none: tensors that say `cuda:0`, lie in the host's memory, and mix with no others.

What computes on them computes real numbers, by the CPU's kernels. As on a GPU, an operation on
tensors of two devices raises, a value comes to the host only where it is asked for, and numpy takes
no such tensor. So code that takes for granted that tensors lie on the CPU fails here as it would on
a GPU; kernels for GPUs do not run, and no time means anything.
"""

import contextlib
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
NAME = "a GPU that is none"
# What torch's C++ takes the tensors for. It makes no device of this kind itself.
_INSIDE = torch.device("meta", 0)
_CPU = torch.device("cpu")

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# What makes the host wait for a value, beside copies to the CPU.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item")


class _OnGpu(torch.Tensor):
    """A tensor on the GPU; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=_INSIDE, **layout
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise RuntimeError(f"{function}: expected a call while the GPU is there, got a later one")

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **options):
        return f"on the GPU: {self.inner}"


@dataclass
class Record:
    """What the host asked of the GPU."""

    waits: list = field(default_factory=list)
    """The names of the operations for which the host waited, in their order."""
    uploads: int = 0
    """Number of copies from the CPU."""
    synchronised: int = 0
    """Number of calls of torch.cuda.synchronize."""


class _Computing(TorchDispatchMode):
    def __init__(self, record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        if torch.is_inference_mode_enabled():  # which takes composed operations apart later
            with self:
                parts = function.decompose(*arguments, **named)
            if parts is not NotImplemented:
                return parts
        tensors = [t for t in tree_flatten((arguments, named))[0] if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, _OnGpu)]
        stays = bool(there)
        if named.get("device") is not None:
            asked = torch.device(named["device"])
            stays = asked.type == "cuda" or asked == _INSIDE
            if stays:
                named["device"] = _CPU
        if there and function not in _COPIES:
            self._refuse_others(function, tensors)
        self._note(function, arguments, there, stays)
        with unset_fake_temporarily():
            results = function(*tree_map(_inner, arguments), **tree_map(_inner, named))
        if not stays:
            return results
        results = tree_map(_on_gpu, results)
        if function._schema.is_mutable:
            return return_and_correct_aliasing(function, arguments, named, results)
        return results

    @staticmethod
    def _refuse_others(function, tensors):
        for tensor in tensors:
            # A scalar on the CPU goes with every device.
            if not isinstance(tensor, _OnGpu) and tensor.dim() and tensor.device == _CPU:
                raise RuntimeError(
                    f"{function}: expected all tensors on {GPU}, got one of shape "
                    f"{tuple(tensor.shape)} on the CPU"
                )

    def _note(self, function, arguments, there, stays):
        name = function._overloadpacket.__name__
        if function is _aten._to_copy.default:
            if there and not stays:
                self.record.waits.append("copy to the CPU")
            self.record.uploads += stays and not there
        elif there and name in _WAITS:
            self.record.waits.append(name)


def _inner(value):
    return value.inner if isinstance(value, _OnGpu) else value


def _on_gpu(value):
    return _OnGpu(value) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def fake_gpu(*, capability=(9, 0), count=1):
    """Let torch find a GPU; yields a Record."""
    record = Record()

    def synchronize(device=None):
        record.synchronised += 1

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: NAME,
        "synchronize": synchronize,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.arange(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    with contextlib.ExitStack() as stack:
        # Within it torch's parser of arguments accepts a GPU that torch cannot reach.
        stack.enter_context(FakeTensorMode())
        for name, stand_in in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
        stack.enter_context(mock.patch.dict("os.environ"))
        stack.enter_context(_Computing(record))
        yield record
