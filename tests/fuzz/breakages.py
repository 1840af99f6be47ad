"""What can be wrong with an argument: each breakage takes a value and returns another one.

A breakage is a list [name, argument, place]. The place is "forward", or "backward" for an argument
of the op of the backward pass, or "between" for values that change after the forward has run.
"""

import torch

SHAPES = ("rank_up", "rank_down", "longer", "shorter", "first_longer", "first_shorter", "empty")
DTYPES = ("int32", "int64", "uint8", "bool", "float32", "float16", "bfloat16", "float64",
          "complex64", "float8_e4m3fn")  # fmt: skip
INDICES = ("negative", "beyond", "largest", "smallest", "one_negative", "one_beyond", "descending",
           "shifted", "short_end", "reversed")  # fmt: skip
OBJECTS = ("none", "list", "meta", "string", "number")
SCALARS = ("minus_one", "zero", "large", "as_float", "true", "as_string", "nan", "inf", "complex",
           "none", "past_int64", "past_float64")  # fmt: skip
INTEGER_TENSORS = (
    "indices", "counts", "cu_inputs", "cu_tapes", "bank_lens", "bounds", "source",
)  # fmt: skip

_ARGUMENTS = {
    "tape_select": ("query", "keys", "read_mask", "bank_lens"),
    "tape_read": ("query", "bank", "read_mask", "bank_lens"),
    "tape_gather": ("bank", "indices", "weights", "counts"),
    "elastic_attention": ("q", "k", "v", "cu_inputs", "cu_tapes"),
    "dual_ffn": ("x", "input_ffn", "tape_ffn", "input_ffn", "tape_ffn", "bounds"),
    "add_layer_norm": ("x", "branch", "weight", "bias"),
    "elastic_attention_qkvpacked": ("qkv", "cu_inputs", "cu_tapes"),
    "compact_rows": ("data", "keep", "cu_inputs", "cu_tapes"),
    "accumulate_rows": ("total", "rows", "source", "weights", "total_weights"),
    "accumulate_rows_": ("total", "rows", "source", "weights", "total_weights"),
}
_SCALAR_ARGUMENTS = {
    "tape_select": ("num_tape_tokens", "topk", "halt_threshold", "average_query", "loss_type"),
    "tape_read": ("num_tape_tokens", "topk", "halt_threshold", "average_query", "capacity"),
    "tape_gather": ("capacity",),
    "elastic_attention": ("max_rows", "softmax_scale"),
    "dual_ffn": ("num_input_rows", "num_rows", "activation", "max_tape_rows"),
    "add_layer_norm": ("eps",),
    "elastic_attention_qkvpacked": ("max_rows", "softmax_scale"),
    "compact_rows": ("capacity",),
}
_OF_BACKWARD = {
    "tape_select": ("query", "keys", "dweights", "dponder", "indices", "counts"),
    "tape_gather": ("dtape", "bank", "indices", "weights", "counts"),
    "elastic_attention": ("dout", "q", "k", "v", "out", "lse", "cu_inputs", "cu_tapes"),
    "dual_ffn": ("dy", "x", "hidden", "tape_hidden", "bounds", "w1", "b1", "w2", "b2", "tape_w1",
                 "tape_b1", "tape_w2", "tape_b2"),
    "add_layer_norm": ("dtotal", "dnormed", "total", "weight", "mean", "rstd"),
    "elastic_attention_qkvpacked": ("dout", "qkv", "out", "lse", "cu_inputs", "cu_tapes"),
    "compact_rows": ("dpacked", "source"),
    "accumulate_rows": ("dsum", "total", "rows", "source", "weights", "total_weights"),
}  # fmt: skip
_KEPT = {
    "tape_select": ("indices", "counts"),
    "tape_gather": ("indices", "counts"),
    "tape_read": ("indices", "counts"),
    "elastic_attention": ("cu_inputs", "cu_tapes"),
    "elastic_attention_qkvpacked": ("cu_inputs", "cu_tapes"),
    "compact_rows": ("source",),
    "accumulate_rows": ("source",),
}


def random_breakage(rng, case):
    """Return [name, argument, place] for a case."""
    op, torch_level = case["op"], case["level"] == "torch"
    draw = rng.random()
    if draw < 0.15 and op in _KEPT:
        return [rng.choice(INDICES), rng.choice(_KEPT[op]), "between"]
    if draw < 0.6 and torch_level and op in _OF_BACKWARD:
        name = rng.choice(_OF_BACKWARD[op])
        return [_of_tensor(rng, name, True), name, "backward"]
    if draw < 0.8 or op not in _SCALAR_ARGUMENTS:
        name = rng.choice(_ARGUMENTS[op])
        if name.endswith("_ffn"):
            field = rng.choice(("w1", "b1", "w2", "b2", "tuple", ""))
            name = f"{name}.{field}" if field else name
        return [_of_tensor(rng, name, torch_level), name, "forward"]
    kinds = ("minus_one", "zero", "nan", "inf", "large") if torch_level else SCALARS
    return [rng.choice(kinds), rng.choice(_SCALAR_ARGUMENTS[op]), "forward"]


def _of_tensor(rng, name, torch_level):
    if name in INTEGER_TENSORS and rng.random() < 0.6:
        return rng.choice(INDICES)
    kinds = [*SHAPES, *SHAPES, *(f"dtype {name}" for name in DTYPES)]
    return rng.choice(kinds if torch_level else [*kinds, *OBJECTS])


def broken(name, value):
    """Return a value with something wrong; as it is where the breakage does not apply to it."""
    if name.startswith("dtype "):
        dtype = getattr(torch, name.removeprefix("dtype "))
        return value.detach().to(dtype) if isinstance(value, torch.Tensor) else value
    if name in _OBJECTS:
        return _OBJECTS[name](value)
    if isinstance(value, torch.Tensor):
        change = _TENSOR_CHANGES.get(name, lambda same: same)
        try:
            return change(value.detach())
        except NotImplementedError:  # torch computes little with float8, which came before
            return value
    if isinstance(value, tuple):
        return (*value, value[0]) if name in ("longer", "rank_up") else value[:3]
    return _SCALAR_CHANGES.get(name, lambda same: same)(value)


def _last(x, more):
    if x.dim() == 0:
        return x
    size = x.shape[-1] + more
    return torch.cat([x, x[..., :1]], -1) if more > 0 and x.shape[-1] else x[..., : max(0, size)]


def _first(x, more):
    if x.dim() == 0:
        return x
    return torch.cat([x, x[:1]]) if more > 0 else x[: max(0, x.shape[0] - 1)]


def _with_one(x, number):
    x = x.clone()
    if x.numel():
        x.flatten()[x.numel() // 2 :][:1] = number
    return x


def _full(x, number):
    return torch.full(x.shape, number, dtype=x.dtype) if not x.dtype.is_complex else x


def _limit(x, which):
    info = torch.iinfo if not (x.is_floating_point() or x.dtype == torch.bool) else None
    return _full(x, getattr(info(x.dtype), which)) if info else x


_TENSOR_CHANGES = {
    "rank_up": lambda x: x.unsqueeze(0),
    "rank_down": lambda x: x[0] if x.dim() and x.shape[0] else x.flatten()[:0].sum(),
    "longer": lambda x: _last(x, 1),
    "shorter": lambda x: _last(x, -1),
    "first_longer": lambda x: _first(x, 1),
    "first_shorter": lambda x: _first(x, -1),
    "empty": lambda x: x[:0] if x.dim() else x,
    "negative": lambda x: -x - 1 if x.dtype not in (torch.bool, torch.uint8) else x,
    "beyond": lambda x: x + 1000 if x.dtype != torch.bool else x,
    "largest": lambda x: _limit(x, "max"),
    "smallest": lambda x: _limit(x, "min"),
    "one_negative": lambda x: _with_one(x, -7) if x.dtype not in (torch.bool, torch.uint8) else x,
    "one_beyond": lambda x: _with_one(x, 10**8) if x.element_size() >= 4 else x,
    "descending": lambda x: x.flip(0) if x.dim() else x,
    "shifted": lambda x: x + 1 if x.dtype != torch.bool else x,
    "short_end": lambda x: _with_last(x),
    "reversed": lambda x: x.flip(-1) if x.dim() else x,
}


def _with_last(x):
    x = x.clone()
    if x.numel() and x.dtype != torch.bool:
        x.flatten()[-1:] = 0
    return x


def _as_list(value):
    # Of a tensor without data, as another change may have made it, nothing is known.
    known = isinstance(value, torch.Tensor) and value.device.type != "meta"
    return value.tolist() if known and value.numel() < 1000 else [value]


_OBJECTS = {
    "none": lambda value: None,
    "list": _as_list,
    "meta": lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value,
    "string": lambda value: "seven",
    "number": lambda value: 3,
}
_SCALAR_CHANGES = {
    "minus_one": lambda value: -1 if not isinstance(value, str) else "",
    "zero": lambda value: type(value)(0) if isinstance(value, int | float) else value,
    "large": lambda value: 33 if isinstance(value, int) else value,
    "as_float": lambda value: float(value) if isinstance(value, int) else value,
    "true": lambda value: True,
    "as_string": lambda value: str(value),
    "nan": lambda value: float("nan") if isinstance(value, float) else value,
    "inf": lambda value: float("inf") if isinstance(value, float) else value,
    "complex": lambda value: 1j,
    "past_int64": lambda value: 1 << 63 if isinstance(value, int) else value,
    "past_float64": lambda value: 10**400 if isinstance(value, float) else value,
}
