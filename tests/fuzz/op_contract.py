"""Whether a call is valid, by what the docstrings of the ops say; a second opinion on their checks.

`judged` returns "valid", "invalid" or "open". An open call may be refused, or may return anything:
nobody promised. It must not end the process.
"""

import math

import torch
from torch import Tensor

from adatape_kernels.op_types import FFN, wide_dtype
from fuzz import row_contract
from fuzz.contract_terms import (
    INT32,
    INT64,
    Invalid,
    Open,
    cotangent,
    flag,
    integer,
    longest_example,
    number,
    one_device,
    require,
    tensor,
)


def judged(op, arguments, level):
    """Return what a call is, and why. Level "public", "torch" or "backward" (a torch op too)."""
    rules = _BACKWARD if level == "backward" else _FORWARD
    try:
        rules[op](dict(arguments), level)
    except Invalid as reason:
        return "invalid", str(reason)
    except Open as reason:
        return "open", str(reason)
    return "valid", ""


def _indices(level):
    return (INT32, INT64) if level == "public" else (INT32,)


def _select(call, level, bank="keys"):
    query = tensor("query", call["query"])
    require(query.dim() == 2 and query.shape[1] > 0, "query has another rank")
    batch, key_dim = query.shape
    keys = tensor(bank, call[bank], dtypes=(query.dtype,))
    require(keys.dim() in (2, 3), f"{bank} has another rank")
    if bank == "keys":
        require(keys.shape[-1] == key_dim, "keys have another width")
    require(keys.shape[-1] >= key_dim, "the bank is too narrow")
    require(keys.dim() == 2 or keys.shape[0] == batch, f"{bank} has another batch")
    bank_size = keys.shape[-2]
    integer("topk", call["topk"], 1, 32)
    require(call["topk"] <= bank_size, "the bank is too small")
    integer("num_tape_tokens", call["num_tape_tokens"], 0)
    number("halt_threshold", call["halt_threshold"])
    require(call["loss_type"] in ("entropy", "max"), "another loss_type")
    if call["read_mask"] is not None:
        tensor("read_mask", call["read_mask"], (batch, bank_size), (torch.bool,))
    if call["bank_lens"] is not None:
        lens = tensor("bank_lens", call["bank_lens"], (batch,), (INT32, INT64))
        one_device(call.values())
        require(all(0 <= n <= bank_size for n in lens.tolist()), "bank_lens outside the bank")
    flag("average_query", call["average_query"])
    one_device(call.values())


def _read(call, level):
    capacity = call.pop("capacity")
    if capacity is not None:
        integer("capacity", capacity, 0)
    _select(call, level, "bank")
    if capacity is not None and capacity < len(call["query"]) * call["num_tape_tokens"]:
        raise Open("the capacity may be too small")


def _reads(call, level):
    """Check what a gathering reads; return the number of its rows and of features."""
    bank = tensor("bank", call["bank"])
    require(bank.dim() in (2, 3), "the bank has another rank")
    indices = tensor("indices", call["indices"], None, (INT32, INT64))
    if level != "public" and indices.dtype == INT64:
        raise Open("int64 below the public function")
    require(indices.dim() == 3, "indices have another rank")
    batch = len(indices)
    require(bank.dim() == 2 or bank.shape[0] == batch, "the bank has another batch")
    tensor("weights", call["weights"], indices.shape, (wide_dtype(bank.dtype),))
    counts = tensor("counts", call["counts"], (batch,), (INT32, INT64))
    one_device(call.values())
    if level != "public" and counts.dtype == INT64:
        raise Open("int64 below the public function")
    _check_read(indices, counts, bank.shape[-2])
    return int(counts.sum()), bank.shape[-1]


def _check_read(indices, counts, bank_size):
    steps = indices.shape[1]
    require(all(0 <= n <= steps for n in counts.tolist()), "counts outside 0 to num_tape_tokens")
    for row, count in zip(indices, counts.tolist(), strict=True):
        read = row[:count]
        require(bool(((read >= 0) & (read < bank_size)).all()), "indices outside the bank")


def _gather(call, level):
    capacity = call["capacity"]
    if capacity is not None:
        integer("capacity", capacity, 0)
    total, _ = _reads(call, level)
    require(capacity is None or capacity >= total, "the capacity is too small")


def _attention(call, level, further=()):
    q = tensor("q", call["q"])
    require(q.dim() == 3 and q.shape[2] > 0, "q has another rank")
    for name in ("k", "v", *further):
        tensor(name, call[name], q.shape, (q.dtype,))
    _attention_options(call, len(q), level)


def _attention_options(call, rows, level):
    one_device(call.values())
    longest = longest_example(call, rows, level)
    if call["max_rows"] is not None:
        integer("max_rows", call["max_rows"], longest)
    if call["softmax_scale"] is not None:
        number("softmax_scale", call["softmax_scale"])
        if math.isinf(call["softmax_scale"]):
            raise Open("an infinite scale")


def _packed_attention(call, level):
    qkv = tensor("qkv", call["qkv"])
    require(qkv.dim() == 4 and qkv.shape[1] == 3 and qkv.shape[3] > 0, "qkv has another shape")
    _attention_options(call, len(qkv), level)


def _parameters(name, ffn, dim, gates, dtype):
    require(isinstance(ffn, tuple | list) and len(ffn) == 4, f"{name} is no FFN of four")
    w1 = tensor(f"{name}.w1", ffn[0], None, (dtype,))
    require(w1.dim() == 2, f"{name}.w1 has another rank")
    hidden = w1.shape[0] // gates
    shapes = (gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,)
    for field, shape, given in zip(FFN._fields, shapes, ffn, strict=True):
        tensor(f"{name}.{field}", given, shape, (dtype,))


def _ffn(call, level):
    if level == "torch":
        _torch_ffn(call)
        return
    x = tensor("x", call["x"])
    require(x.dim() == 2, "x has another rank")
    require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    _parameters("input_ffn", call["input_ffn"], x.shape[1], 1, x.dtype)
    if call["tape_ffn"] is not None:
        _parameters("tape_ffn", call["tape_ffn"], x.shape[1], 2, x.dtype)
    one_device([x, *call["input_ffn"], *(call["tape_ffn"] or ())])
    counts = []
    for name in ("num_input_rows", "num_rows"):
        value = call[name]
        if value is None:
            require(name == "num_rows", f"{name} is None")
            value = len(x)
        if isinstance(value, Tensor):
            require(value.dim() == 0 and value.dtype in (INT32, INT64), f"{name} is no scalar")
            value = int(value)
        integer(name, value, 0, len(x))
        counts.append(value)
    if call["tape_ffn"] is None:
        return
    require(counts[0] <= counts[1], "num_input_rows above num_rows")


def _parameters_of(call):
    return [call[name] for name in ("w1", "b1", "w2", "b2")], [
        call[f"tape_{name}"] for name in ("w1", "b1", "w2", "b2")
    ]


def _torch_ffn(call):
    x = tensor("x", call["x"])
    require(x.dim() == 2, "x has another rank")
    require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    own, of_tape = _parameters_of(call)
    _parameters("input", own, x.shape[1], 1, x.dtype)
    if any(p is not None for p in of_tape):
        _parameters("tape", of_tape, x.shape[1], 2, x.dtype)
    elif call["max_tape_rows"]:
        raise Open("tape rows without a feed-forward of their own")
    split = len(x) if call["num_input_rows"] is None else call["num_input_rows"]
    integer("num_input_rows", split, 0)
    integer("max_tape_rows", call["max_tape_rows"], 0)
    _row_bounds(call, split, call["max_tape_rows"], len(x))


def _row_bounds(call, most_inputs, most_tapes, rows):
    bounds = call["bounds"]
    said = call["num_input_rows"] or 0
    require(max(said, 0) + most_tapes <= rows, "more rows than x has")
    if bounds is None:
        require(call["num_input_rows"] is not None, "neither num_input_rows nor bounds")
        return
    tensor("bounds", bounds, (2,), (INT64, INT32))
    one_device(call.values())
    if bounds.dtype == INT32:
        raise Open("int32 bounds")
    middle, end = bounds.tolist()
    require(0 <= middle <= most_inputs and middle <= end <= rows, "bounds outside x")
    if end - middle > most_tapes:
        raise Open("more tape rows than were said")


def _norm(call, level):
    x = tensor("x", call["x"])
    require(x.dim() == 2 and x.shape[1] > 0, "x has another rank")
    tensor("branch", call["branch"], x.shape)
    for name in ("weight", "bias"):
        tensor(name, call[name], x.shape[1:], (x.dtype, torch.float32))
    one_device(call.values())
    number("eps", call["eps"])
    require(call["eps"] >= 0, "eps is negative")
    if math.isinf(call["eps"]):
        raise Open("an infinite eps")


def _select_backward(call, level):
    query = tensor("query", call["query"])
    require(query.dim() == 2 and query.shape[1] > 0, "query has another rank")
    keys = tensor("keys", call["keys"], None, (query.dtype,))
    require(keys.dim() in (2, 3) and keys.shape[-1] == query.shape[1], "keys of another width")
    require(keys.dim() == 2 or len(keys) == len(query), "keys have another batch")
    indices = tensor("indices", call["indices"], None, (INT32, INT64))
    require(indices.dim() == 3 and len(indices) == len(query), "indices have another rank")
    counts = tensor("counts", call["counts"], (len(query),), (INT32, INT64))
    wide = torch.empty(0, dtype=wide_dtype(query.dtype))
    require(call["loss_type"] in ("entropy", "max"), "another loss_type")
    for name, shape in (("dweights", indices.shape), ("dponder", counts.shape)):
        tensor(name, call[name], shape)
    one_device(call.values())
    if INT64 in (indices.dtype, counts.dtype):
        raise Open("int64 below the public function")
    _check_read(indices, counts, keys.shape[-2])
    cotangent("dweights", call["dweights"], wide.new_empty(indices.shape))
    cotangent("dponder", call["dponder"], wide.new_empty(counts.shape))
    if not 1 <= indices.shape[2] <= min(32, keys.shape[-2]):
        raise Open("reads of no entry, or of more than there are")


def _gather_backward(call, level):
    total, width = _reads(call, level)
    dtape = tensor("dtape", call["dtape"])
    require(dtape.dim() == 2 and dtape.shape[1] == width, "dtape has another width")
    require(len(dtape) >= total, "dtape has too few rows")
    cotangent("dtape", dtape, call["bank"].new_empty(dtape.shape))


def _attention_backward(call, level):
    _attention(call, level, ("out",))
    q = call["q"]
    tensor("lse", call["lse"], (q.shape[1], len(q)), (wide_dtype(q.dtype),))
    cotangent("dout", call["dout"], q)


def _packed_attention_backward(call, level):
    _packed_attention(call, level)
    rows, _, *heads = call["qkv"].shape
    tensor("out", call["out"], (rows, *heads), (call["qkv"].dtype,))
    tensor("lse", call["lse"], (heads[0], rows), (wide_dtype(call["qkv"].dtype),))
    cotangent("dout", call["dout"], call["qkv"][:, 0])


def _ffn_backward(call, level):
    x = tensor("x", call["x"])
    require(x.dim() == 2, "x has another rank")
    require(call["activation"] in ("gelu_tanh", "gelu", "relu"), "another activation")
    own, of_tape = _parameters_of(call)
    _parameters("input", own, x.shape[1], 1, x.dtype)
    if any(p is not None for p in of_tape):
        _parameters("tape", of_tape, x.shape[1], 2, x.dtype)
    hidden, tape_hidden = call["hidden"], call["tape_hidden"]
    for name, saved in (("hidden", hidden), ("tape_hidden", tape_hidden)):
        tensor(name, saved, None, (x.dtype,))
        require(saved.dim() == 2, f"{name} has another rank")
    require(hidden.shape[1] == own[0].shape[0], "hidden has another width")
    width = 0 if of_tape[0] is None else of_tape[0].shape[0]
    if tape_hidden.shape[1] != width:
        if len(tape_hidden) and width:
            raise Invalid("tape_hidden has another width")
        raise Open("tape_hidden is empty")
    split = call["num_input_rows"]
    require(len(hidden) == (len(x) if split is None else split), "hidden has other rows")
    tensor("dy", call["dy"], x.shape)
    _row_bounds(call, len(hidden), len(tape_hidden), len(x))
    one_device(call.values())
    cotangent("dy", call["dy"], x)


def _norm_backward(call, level):
    total = tensor("total", call["total"])
    require(total.dim() == 2 and total.shape[1] > 0, "total has another rank")
    tensor("weight", call["weight"], total.shape[1:], (total.dtype, torch.float32))
    for name in ("mean", "rstd"):
        tensor(name, call[name], total.shape[:1], (wide_dtype(total.dtype),))
    for name in ("dtotal", "dnormed"):
        tensor(name, call[name], total.shape)
    for name in ("dtotal", "dnormed"):
        cotangent(name, call[name], total)


_FORWARD = {
    "tape_select": _select,
    "tape_read": _read,
    "tape_gather": _gather,
    "elastic_attention": _attention,
    "elastic_attention_qkvpacked": _packed_attention,
    "dual_ffn": _ffn,
    "add_layer_norm": _norm,
    "compact_rows": row_contract.compact,
    "accumulate_rows": row_contract.accumulate,
    "accumulate_rows_": row_contract.accumulate_in_place,
}
_BACKWARD = {
    "tape_select": _select_backward,
    "tape_gather": _gather_backward,
    "elastic_attention": _attention_backward,
    "elastic_attention_qkvpacked": _packed_attention_backward,
    "dual_ffn": _ffn_backward,
    "add_layer_norm": _norm_backward,
    "compact_rows": row_contract.compact_backward,
    "accumulate_rows": row_contract.accumulate_backward,
}
