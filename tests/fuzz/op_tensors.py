"""Tensors of odd values and odd strides, by the names of both."""

import torch

from adatape_kernels.op_types import FFN

LAYOUTS = (
    "contiguous",
    "offset",
    "wide",
    "step",
    "first_step",
    "transposed",
    "permuted",
    "stride0",
)
"""Names of strides. What lies between the values is NaN, or a number that is no valid index."""

HUGE = {torch.float16: 1e4}


def generator_of(case):
    return torch.Generator().manual_seed(case["seed"])


def floats(shape, dtype, values, generator):
    """A contiguous tensor of a dtype, whose values follow the pattern of this name."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chance = torch.rand(shape, generator=generator)
    match values:
        case "integers":
            x = x.round()
        case "zeros":
            x = torch.zeros_like(x)
        case "positive":
            x = x.abs() + 0.1
        case "repeated":
            if x.dim() > 1 and x.shape[-2] > 0:
                kinds = torch.randint(min(3, x.shape[-2]), x.shape[-2:-1], generator=generator)
                x = x.index_select(-2, kinds)
        case "infinities":
            x[chance < 0.1] = torch.inf
            x[chance > 0.9] = -torch.inf
        case "nan":
            x[chance < 0.1] = torch.nan
        case "low_first":  # a key whose first feature is -inf has a score of +-inf
            if x.dim() > 1 and x.shape[-1] > 0:
                x[..., : x.shape[-2] * 3 // 4, 0] = -torch.inf
        case "huge":
            x = x * HUGE.get(dtype, 1e12)
        case "large":
            x = x * 30
        case "tiny":
            x = x * 1e-30
    return x.to(dtype)


FLOAT_VALUES = ("integers", "zeros", "repeated", "infinities", "nan", "low_first", "huge", "tiny")


def laid_out(x, layout):
    """The same values at other strides; of "stride0" those of the first index of an axis."""
    if layout == "contiguous" or x.dim() == 0:
        return x
    shape = list(x.shape)
    match layout:
        case "offset":
            buffer = _between(x, [x.numel() + 3])
            view = buffer[1 : 1 + x.numel()].view(shape)
        case "wide":
            view = _between(x, [*shape[:-1], shape[-1] + 3])[..., : shape[-1]]
        case "step":
            view = _between(x, [*shape[:-1], 2 * shape[-1]])[..., ::2]
        case "first_step":
            view = _between(x, [2 * shape[0], *shape[1:]])[::2]
        case "transposed":
            view = _between(x, [*shape[:-2], *shape[-2:][::-1]])
            view = view.mT if x.dim() > 1 else view
        case "permuted":
            view = _between(x, shape[::-1]).permute(*reversed(range(x.dim())))
        case "stride0":
            return x[:1].clone().expand(shape) if shape[0] else x
    return view.copy_(x)


def _between(x, shape):
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return torch.full(shape, torch.nan, dtype=x.dtype)
    return torch.full(shape, 1 if x.dtype == torch.bool else 10**9, dtype=x.dtype)


def between_elements(x):
    """Return a copy of what lies in a tensor's memory beside its elements."""
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":
        return torch.zeros(0)
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    beside = torch.ones(memory.shape, dtype=torch.bool)
    beside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return memory[beside]


def contiguous(value):
    """A value with every tensor in it copied to plain strides."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, FFN):
        return FFN(*map(contiguous, value))
    return value


def same_bits(a, b):
    """Equal shape, dtype and bits, where NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = (
        x.detach().nan_to_num(0.0, torch.inf, -torch.inf).contiguous().view(integer) for x in (a, b)
    )
    return torch.equal(*bits) and torch.equal(a.isnan(), b.isnan())
