"""What the contracts of the ops are made of: conditions on one argument, or on a few together."""

import itertools
import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32, INT64 = torch.int32, torch.int64


class Invalid(Exception):
    pass


class Open(Exception):
    pass


def require(condition, why):
    if not condition:
        raise Invalid(why)


def tensor(name, x, shape=None, dtypes=FLOATS):
    require(isinstance(x, Tensor), f"{name} is no tensor")
    require(x.dtype in dtypes, f"{name} is of {x.dtype}")
    if shape is not None:
        require(tuple(x.shape) == tuple(shape), f"{name} has the shape {tuple(x.shape)}")
    return x


def one_device(values):
    tensors = [x for x in values if isinstance(x, Tensor)]
    require(len({x.device for x in tensors}) < 2, "two devices")
    if tensors and tensors[0].device.type == "meta":
        raise Open("tensors without values")


def integer(name, value, least, most=None):
    if isinstance(value, Tensor):
        raise Open(f"{name} is a tensor")
    plain = isinstance(value, int) and not isinstance(value, bool)
    require(plain, f"{name} is {value!r}")
    require(least <= value <= (most if most is not None else 2**62), f"{name} is {value}")
    if value > 10**6:
        raise Open(f"{name} is large")


def number(name, value):
    require(isinstance(value, int | float), f"{name} is {value!r}")
    require(not isinstance(value, int) or value.bit_length() < 1024, f"{name} is too large")
    require(not math.isnan(value), f"{name} is NaN")
    if isinstance(value, bool):
        raise Open(f"{name} is a bool")


def flag(name, value):
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise Open(f"{name} is a number")
    require(isinstance(value, bool), f"{name} is {value!r}")


def longest_example(call, rows, level):
    """Check the offsets of a call among so many rows; return the rows of the longest example."""
    cu_inputs = tensor("cu_inputs", call["cu_inputs"], None, (INT32, INT64))
    cu_tapes = tensor("cu_tapes", call["cu_tapes"], None, (INT32, INT64))
    require(cu_inputs.dim() == 1 and len(cu_inputs) > 0, "cu_inputs have another rank")
    require(cu_tapes.shape == cu_inputs.shape, "cu_tapes have another length")
    if level != "public" and INT64 in (cu_inputs.dtype, cu_tapes.dtype):
        raise Open("int64 below the public function")
    one_device(call.values())
    inputs, tapes = cu_inputs.tolist(), cu_tapes.tolist()
    for name, values in (("cu_inputs", inputs), ("cu_tapes", tapes)):
        ascending = all(a <= b for a, b in itertools.pairwise(values))
        require(ascending and values[-1] <= rows, f"{name} descend or pass the rows")
    require(inputs[0] == 0 and tapes[0] == inputs[-1], "the offsets do not join")
    pairs = zip(itertools.pairwise(inputs), itertools.pairwise(tapes), strict=True)
    return max((b - a + d - c for (a, b), (c, d) in pairs), default=0)


def cotangent(name, x, like):
    tensor(name, x, like.shape)
    if x.dtype != like.dtype:
        raise Open(f"{name} of another dtype")
