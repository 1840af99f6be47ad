"""Whether a call is valid, by what the docstrings of the ops say; a second opinion on their checks.

`judged` returns "valid", "invalid" or "open". An open call may be refused, or may return anything:
nobody promised. It must not end the process.
"""

import itertools
import math

import torch
from torch import Tensor

from adatape_kernels.op_types import FFN, wide_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32, INT64 = torch.int32, torch.int64


class _Invalid(Exception):
    pass


class _Open(Exception):
    pass


def judged(op, arguments, level):
    """Return what a call is, and why. Level "public", "torch" or "backward" (a torch op too)."""
    rules = _BACKWARD if level == "backward" else _FORWARD
    try:
        rules[op](dict(arguments), level)
    except _Invalid as reason:
        return "invalid", str(reason)
    except _Open as reason:
        return "open", str(reason)
    return "valid", ""


def _require(condition, why):
    if not condition:
        raise _Invalid(why)


def _tensor(name, x, shape=None, dtypes=FLOATS):
    _require(isinstance(x, Tensor), f"{name} is no tensor")
    _require(x.dtype in dtypes, f"{name} is of {x.dtype}")
    if shape is not None:
        _require(tuple(x.shape) == tuple(shape), f"{name} has the shape {tuple(x.shape)}")
    return x


def _one_device(values):
    tensors = [x for x in values if isinstance(x, Tensor)]
    _require(len({x.device for x in tensors}) < 2, "two devices")
    if tensors and tensors[0].device.type == "meta":
        raise _Open("tensors without values")


def _integer(name, value, least, most=None):
    if isinstance(value, Tensor):
        raise _Open(f"{name} is a tensor")
    plain = isinstance(value, int) and not isinstance(value, bool)
    _require(plain, f"{name} is {value!r}")
    _require(least <= value <= (most if most is not None else 2**62), f"{name} is {value}")
    if value > 10**6:
        raise _Open(f"{name} is large")


def _number(name, value):
    _require(isinstance(value, int | float), f"{name} is {value!r}")
    _require(not isinstance(value, int) or value.bit_length() < 1024, f"{name} is too large")
    _require(not math.isnan(value), f"{name} is NaN")
    if isinstance(value, bool):
        raise _Open(f"{name} is a bool")


def _flag(name, value):
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise _Open(f"{name} is a number")
    _require(isinstance(value, bool), f"{name} is {value!r}")


def _indices(level):
    return (INT32, INT64) if level == "public" else (INT32,)


def _select(call, level, bank="keys"):
    query = _tensor("query", call["query"])
    _require(query.dim() == 2 and query.shape[1] > 0, "query has another rank")
    batch, key_dim = query.shape
    keys = _tensor(bank, call[bank], dtypes=(query.dtype,))
    _require(keys.dim() in (2, 3), f"{bank} has another rank")
    if bank == "keys":
        _require(keys.shape[-1] == key_dim, "keys have another width")
    _require(keys.shape[-1] >= key_dim, "the bank is too narrow")
    _require(keys.dim() == 2 or keys.shape[0] == batch, f"{bank} has another batch")
    bank_size = keys.shape[-2]
    _integer("topk", call["topk"], 1, 32)
    _require(call["topk"] <= bank_size, "the bank is too small")
    _integer("num_tape_tokens", call["num_tape_tokens"], 0)
    _number("halt_threshold", call["halt_threshold"])
    _require(call["loss_type"] in ("entropy", "max"), "another loss_type")
    if call["read_mask"] is not None:
        _tensor("read_mask", call["read_mask"], (batch, bank_size), (torch.bool,))
    if call["bank_lens"] is not None:
        lens = _tensor("bank_lens", call["bank_lens"], (batch,), (INT32, INT64))
        _one_device(call.values())
        _require(all(0 <= n <= bank_size for n in lens.tolist()), "bank_lens outside the bank")
    _flag("average_query", call["average_query"])
    _one_device(call.values())


def _read(call, level):
    capacity = call.pop("capacity")
    if capacity is not None:
        _integer("capacity", capacity, 0)
    _select(call, level, "bank")
    if capacity is not None and capacity < len(call["query"]) * call["num_tape_tokens"]:
        raise _Open("the capacity may be too small")


def _reads(call, level):
    """Check what a gathering reads; return the number of its rows and of features."""
    bank = _tensor("bank", call["bank"])
    _require(bank.dim() in (2, 3), "the bank has another rank")
    indices = _tensor("indices", call["indices"], None, (INT32, INT64))
    if level != "public" and indices.dtype == INT64:
        raise _Open("int64 below the public function")
    _require(indices.dim() == 3, "indices have another rank")
    batch = len(indices)
    _require(bank.dim() == 2 or bank.shape[0] == batch, "the bank has another batch")
    _tensor("weights", call["weights"], indices.shape, (wide_dtype(bank.dtype),))
    counts = _tensor("counts", call["counts"], (batch,), (INT32, INT64))
    _one_device(call.values())
    if level != "public" and counts.dtype == INT64:
        raise _Open("int64 below the public function")
    _check_read(indices, counts, bank.shape[-2])
    return int(counts.sum()), bank.shape[-1]


def _check_read(indices, counts, bank_size):
    steps = indices.shape[1]
    _require(all(0 <= n <= steps for n in counts.tolist()), "counts outside 0 to num_tape_tokens")
    for row, count in zip(indices, counts.tolist(), strict=True):
        read = row[:count]
        _require(bool(((read >= 0) & (read < bank_size)).all()), "indices outside the bank")


def _gather(call, level):
    capacity = call["capacity"]
    if capacity is not None:
        _integer("capacity", capacity, 0)
    total, _ = _reads(call, level)
    _require(capacity is None or capacity >= total, "the capacity is too small")


def _offsets(call, rows, level):
    cu_inputs = _tensor("cu_inputs", call["cu_inputs"], None, (INT32, INT64))
    cu_tapes = _tensor("cu_tapes", call["cu_tapes"], None, (INT32, INT64))
    _require(cu_inputs.dim() == 1 and len(cu_inputs) > 0, "cu_inputs have another rank")
    _require(cu_tapes.shape == cu_inputs.shape, "cu_tapes have another length")
    if level != "public" and INT64 in (cu_inputs.dtype, cu_tapes.dtype):
        raise _Open("int64 below the public function")
    _one_device(call.values())
    inputs, tapes = cu_inputs.tolist(), cu_tapes.tolist()
    for name, values in (("cu_inputs", inputs), ("cu_tapes", tapes)):
        ascending = all(a <= b for a, b in itertools.pairwise(values))
        _require(ascending and values[-1] <= rows, f"{name} descend or pass the rows")
    _require(inputs[0] == 0 and tapes[0] == inputs[-1], "the offsets do not join")
    pairs = zip(itertools.pairwise(inputs), itertools.pairwise(tapes), strict=True)
    return max((b - a + d - c for (a, b), (c, d) in pairs), default=0)


def _attention(call, level, further=()):
    q = _tensor("q", call["q"])
    _require(q.dim() == 3 and q.shape[2] > 0, "q has another rank")
    for name in ("k", "v", *further):
        _tensor(name, call[name], q.shape, (q.dtype,))
    _one_device(call.values())
    longest = _offsets(call, len(q), level)
    if call["max_rows"] is not None:
        _integer("max_rows", call["max_rows"], longest)
    if call["softmax_scale"] is not None:
        _number("softmax_scale", call["softmax_scale"])
        if math.isinf(call["softmax_scale"]):
            raise _Open("an infinite scale")


def _parameters(name, ffn, dim, gates, dtype):
    _require(isinstance(ffn, tuple | list) and len(ffn) == 4, f"{name} is no FFN of four")
    w1 = _tensor(f"{name}.w1", ffn[0], None, (dtype,))
    _require(w1.dim() == 2, f"{name}.w1 has another rank")
    hidden = w1.shape[0] // gates
    shapes = (gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,)
    for field, shape, given in zip(FFN._fields, shapes, ffn, strict=True):
        _tensor(f"{name}.{field}", given, shape, (dtype,))


def _ffn(call, level):
    if level == "torch":
        _torch_ffn(call)
        return
    x = _tensor("x", call["x"])
    _require(x.dim() == 2, "x has another rank")
    _require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    _parameters("input_ffn", call["input_ffn"], x.shape[1], 1, x.dtype)
    if call["tape_ffn"] is not None:
        _parameters("tape_ffn", call["tape_ffn"], x.shape[1], 2, x.dtype)
    _one_device([x, *call["input_ffn"], *(call["tape_ffn"] or ())])
    counts = []
    for name in ("num_input_rows", "num_rows"):
        value = call[name]
        if value is None:
            _require(name == "num_rows", f"{name} is None")
            value = len(x)
        if isinstance(value, Tensor):
            _require(value.dim() == 0 and value.dtype in (INT32, INT64), f"{name} is no scalar")
            value = int(value)
        _integer(name, value, 0, len(x))
        counts.append(value)
    if call["tape_ffn"] is None:
        return
    _require(counts[0] <= counts[1], "num_input_rows above num_rows")


def _parameters_of(call):
    return [call[name] for name in ("w1", "b1", "w2", "b2")], [
        call[f"tape_{name}"] for name in ("w1", "b1", "w2", "b2")
    ]


def _torch_ffn(call):
    x = _tensor("x", call["x"])
    _require(x.dim() == 2, "x has another rank")
    _require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    own, of_tape = _parameters_of(call)
    _parameters("input", own, x.shape[1], 1, x.dtype)
    if any(p is not None for p in of_tape):
        _parameters("tape", of_tape, x.shape[1], 2, x.dtype)
    elif call["max_tape_rows"]:
        raise _Open("tape rows without a feed-forward of their own")
    split = len(x) if call["num_input_rows"] is None else call["num_input_rows"]
    _integer("num_input_rows", split, 0)
    _integer("max_tape_rows", call["max_tape_rows"], 0)
    _row_bounds(call, split, call["max_tape_rows"], len(x))


def _row_bounds(call, most_inputs, most_tapes, rows):
    bounds = call["bounds"]
    said = call["num_input_rows"] or 0
    _require(max(said, 0) + most_tapes <= rows, "more rows than x has")
    if bounds is None:
        _require(call["num_input_rows"] is not None, "neither num_input_rows nor bounds")
        return
    _tensor("bounds", bounds, (2,), (INT64, INT32))
    _one_device(call.values())
    if bounds.dtype == INT32:
        raise _Open("int32 bounds")
    middle, end = bounds.tolist()
    _require(0 <= middle <= most_inputs and middle <= end <= rows, "bounds outside x")
    if end - middle > most_tapes:
        raise _Open("more tape rows than were said")


def _norm(call, level):
    x = _tensor("x", call["x"])
    _require(x.dim() == 2 and x.shape[1] > 0, "x has another rank")
    _tensor("branch", call["branch"], x.shape)
    for name in ("weight", "bias"):
        _tensor(name, call[name], x.shape[1:], (x.dtype, torch.float32))
    _one_device(call.values())
    _number("eps", call["eps"])
    _require(call["eps"] >= 0, "eps is negative")
    if math.isinf(call["eps"]):
        raise _Open("an infinite eps")


def _cotangent(name, x, like):
    _tensor(name, x, like.shape)
    if x.dtype != like.dtype:
        raise _Open(f"{name} of another dtype")


def _select_backward(call, level):
    query = _tensor("query", call["query"])
    _require(query.dim() == 2 and query.shape[1] > 0, "query has another rank")
    keys = _tensor("keys", call["keys"], None, (query.dtype,))
    _require(keys.dim() in (2, 3) and keys.shape[-1] == query.shape[1], "keys of another width")
    _require(keys.dim() == 2 or len(keys) == len(query), "keys have another batch")
    indices = _tensor("indices", call["indices"], None, (INT32, INT64))
    _require(indices.dim() == 3 and len(indices) == len(query), "indices have another rank")
    counts = _tensor("counts", call["counts"], (len(query),), (INT32, INT64))
    wide = torch.empty(0, dtype=wide_dtype(query.dtype))
    _require(call["loss_type"] in ("entropy", "max"), "another loss_type")
    for name, shape in (("dweights", indices.shape), ("dponder", counts.shape)):
        _tensor(name, call[name], shape)
    _one_device(call.values())
    if INT64 in (indices.dtype, counts.dtype):
        raise _Open("int64 below the public function")
    _check_read(indices, counts, keys.shape[-2])
    _cotangent("dweights", call["dweights"], wide.new_empty(indices.shape))
    _cotangent("dponder", call["dponder"], wide.new_empty(counts.shape))
    if not 1 <= indices.shape[2] <= min(32, keys.shape[-2]):
        raise _Open("reads of no entry, or of more than there are")


def _gather_backward(call, level):
    total, width = _reads(call, level)
    dtape = _tensor("dtape", call["dtape"])
    _require(dtape.dim() == 2 and dtape.shape[1] == width, "dtape has another width")
    _require(len(dtape) >= total, "dtape has too few rows")
    _cotangent("dtape", dtape, call["bank"].new_empty(dtape.shape))


def _attention_backward(call, level):
    _attention(call, level, ("out",))
    q = call["q"]
    _tensor("lse", call["lse"], (q.shape[1], len(q)), (wide_dtype(q.dtype),))
    _cotangent("dout", call["dout"], q)


def _ffn_backward(call, level):
    x = _tensor("x", call["x"])
    _require(x.dim() == 2, "x has another rank")
    _require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    own, of_tape = _parameters_of(call)
    _parameters("input", own, x.shape[1], 1, x.dtype)
    if any(p is not None for p in of_tape):
        _parameters("tape", of_tape, x.shape[1], 2, x.dtype)
    hidden, tape_hidden = call["hidden"], call["tape_hidden"]
    for name, saved in (("hidden", hidden), ("tape_hidden", tape_hidden)):
        _tensor(name, saved, None, (x.dtype,))
        _require(saved.dim() == 2, f"{name} has another rank")
    _require(hidden.shape[1] == own[0].shape[0], "hidden has another width")
    width = 0 if of_tape[0] is None else of_tape[0].shape[0]
    if tape_hidden.shape[1] != width:
        if len(tape_hidden) and width:
            raise _Invalid("tape_hidden has another width")
        raise _Open("tape_hidden is empty")
    split = call["num_input_rows"]
    _require(len(hidden) == (len(x) if split is None else split), "hidden has other rows")
    _tensor("dy", call["dy"], x.shape)
    _row_bounds(call, len(hidden), len(tape_hidden), len(x))
    _one_device(call.values())
    _cotangent("dy", call["dy"], x)


def _norm_backward(call, level):
    total = _tensor("total", call["total"])
    _require(total.dim() == 2 and total.shape[1] > 0, "total has another rank")
    _tensor("weight", call["weight"], total.shape[1:], (total.dtype, torch.float32))
    for name in ("mean", "rstd"):
        _tensor(name, call[name], total.shape[:1], (wide_dtype(total.dtype),))
    for name in ("dtotal", "dnormed"):
        _tensor(name, call[name], total.shape)
    for name in ("dtotal", "dnormed"):
        _cotangent(name, call[name], total)


_FORWARD = {
    "tape_select": _select,
    "tape_read": _read,
    "tape_gather": _gather,
    "elastic_attention": _attention,
    "dual_ffn": _ffn,
    "add_layer_norm": _norm,
}
_BACKWARD = {
    "tape_select": _select_backward,
    "tape_gather": _gather_backward,
    "elastic_attention": _attention_backward,
    "dual_ffn": _ffn_backward,
    "add_layer_norm": _norm_backward,
}
