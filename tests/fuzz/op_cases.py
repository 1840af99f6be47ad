"""Random calls of the ops: their sizes, options, values, strides, and what is broken in them."""

from adatape_kernels.op_types import FFN
from fuzz.breakages import random_breakage
from fuzz.op_arguments import OPS
from fuzz.op_tensors import FLOAT_VALUES, LAYOUTS

TENSORS = {
    "tape_select": ("query", "keys", "read_mask", "bank_lens"),
    "tape_read": ("query", "bank", "read_mask", "bank_lens"),
    "tape_gather": ("bank", "indices", "weights", "counts"),
    "elastic_attention": ("q", "k", "v", "cu_inputs", "cu_tapes"),
    "elastic_attention_qkvpacked": ("qkv", "cu_inputs", "cu_tapes"),
    "dual_ffn": ("x", *(f"{name}_ffn.{p}" for name in ("input", "tape") for p in FFN._fields)),
    "add_layer_norm": ("x", "branch", "weight", "bias"),
    "compact_rows": ("data", "keep", "cu_inputs", "cu_tapes"),
    **dict.fromkeys(
        ("accumulate_rows", "accumulate_rows_"),
        ("total", "rows", "source", "weights", "total_weights"),
    ),
}  # fmt: skip
INTEGERS = (
    "read_mask", "bank_lens", "indices", "counts", "cu_inputs", "cu_tapes", "keep", "source",
)  # fmt: skip
COTANGENT = "cotangent"
"""The name by which a case gives the strides of the gradients of an op's results."""

_DTYPES = ("float32", "float32", "bfloat16", "float16", "float64")
_SLOW = ("triton", "cuda")
# Of scores that float32 rounds to whole numbers, no backward can take exponentials once more; and
# what a LayerNorm is to make of a row that is all rounding is nobody's guess.
_ATTENTION = ("elastic_attention", "elastic_attention_qkvpacked")
_ILL_CONDITIONED = (*_ATTENTION, "add_layer_norm")


def random_case(rng, backend):
    """Return a call for a backend; three of ten are broken somewhere."""
    slow = backend in _SLOW
    op = rng.choice([name for name in OPS if backend != "cuda" or name != "add_layer_norm"])
    dtype = rng.choice(_DTYPES)
    if backend == "cpp" and dtype in ("float64", "float16") and rng.random() < 0.9:
        dtype = rng.choice(("float32", "bfloat16"))
    if slow and dtype in ("float64", "bfloat16") and rng.random() < 0.9:
        dtype = rng.choice(("float32", "float16"))
    sizes, options = _SIZES[op](rng, slow), _OPTIONS[op](rng)
    if backend == "cuda" and op in _ATTENTION and rng.random() < 0.9:
        dtype, sizes["head_dim"], options["max_rows"] = "float16", 64, True
    if rng.random() < 0.15:
        options["index_dtype"] = "int64"
    case = {
        "area": "ops",
        "backend": backend,
        "op": op,
        "level": rng.choice(("public", "public", "torch")),
        "dtype": dtype,
        "seed": rng.randrange(1 << 31),
        "gradients": rng.random() < 0.8,
        "sizes": sizes,
        "options": options,
        "values": {},
        "layouts": {},
        "breakages": [],
        "subset": rng.random() < (0.1 if slow else 0.4),
        "strides": rng.random() < (0.3 if slow else 1.0),
    }
    for name in TENSORS[op]:
        if name not in INTEGERS and rng.random() < 0.2:
            values = rng.choice(FLOAT_VALUES)
            if values == "huge" and op in _ILL_CONDITIONED:
                values = "large"
            case["values"][name] = values
        if rng.random() < 0.25:
            case["layouts"][name] = rng.choice(LAYOUTS)
    if "repeated" in case["values"].values() or "stride0" in case["layouts"].values():
        # Of equal keys the gradients cancel, but for rounding, which is huge with huge numbers.
        case["values"] = {n: v.replace("huge", "large") for n, v in case["values"].items()}
    if rng.random() < 0.3:
        case["layouts"][COTANGENT] = rng.choice(LAYOUTS)
    if rng.random() < 0.05:
        _score_low(rng, case, slow)
    if rng.random() < 0.3:
        case["breakages"] = [random_breakage(rng, case)]
        if rng.random() < 0.1:
            case["breakages"].append(random_breakage(rng, case))
    return case


def _score_low(rng, case, slow):
    """Let the first keys have scores of -inf, so many that a kernel has a block of them alone."""
    first = {"tape_select": "query", "tape_read": "query", "elastic_attention": "q"}.get(case["op"])
    if first is None:
        return
    second = {"tape_select": "keys", "tape_read": "bank"}.get(case["op"], "k")
    case["values"] |= {first: "positive", second: "low_first"}
    sizes = case["sizes"]
    if case["op"] != "elastic_attention":
        sizes["bank_size"] = max(sizes["topk"], rng.randint(60, 90) if slow else 1500)
    elif sizes["input_lens"]:
        sizes["num_heads"] = 1
        sizes["input_lens"][0] = rng.randint(90, 150) if slow else rng.randint(1400, 1800)


def _size(rng, most):
    """Small mostly, zero and one often."""
    return rng.choice((0, 1, 1, 2, 3, rng.randint(1, most), rng.randint(1, most)))


def _select_sizes(rng, slow):
    large = not slow and rng.random() < 0.02
    topk = rng.choice((1, 1, 2, 3, rng.randint(1, 4 if slow else 32)))
    return {
        "batch": _size(rng, 3 if slow else 6),
        "bank_size": max(
            topk, rng.randint(1000, 2500) if large else _size(rng, 24 if slow else 70)
        ),
        "key_dim": max(1, _size(rng, 20 if slow else 140)),
        "topk": topk,
        "num_tape_tokens": _size(rng, 2 if slow else 6),
        "further": rng.choice((0, 0, 1, rng.randint(0, 40))),
    }


def _gather_sizes(rng, slow):
    steps = _size(rng, 3 if slow else 6)
    return {
        "counts": [rng.randint(0, steps) for _ in range(_size(rng, 4 if slow else 6))],
        "bank_size": _size(rng, 30),
        "dim": _size(rng, 40 if slow else 200),
        "topk": _size(rng, 5 if slow else 12),
        "num_tape_tokens": steps,
    }


def _attention_sizes(rng, slow):
    batch, most = _size(rng, 3 if slow else 5), 6 if slow else rng.choice((4, 20, 20, 70))
    sizes = {
        "input_lens": [_size(rng, most) for _ in range(batch)],
        "tape_lens": [_size(rng, most) for _ in range(batch)],
        "unused": rng.choice((0, 0, 1, 5)),
        "num_heads": rng.choice((0, 1, 1, 2, 3)),
        "head_dim": max(1, _size(rng, 20 if slow else 140)),
    }
    if not slow and batch and rng.random() < 0.01:
        sizes |= {"num_heads": 1, "head_dim": 8}
        sizes["input_lens"][0] = rng.randint(1000, 1500)
    return sizes


def _ffn_sizes(rng, slow):
    most = 20 if slow else 60
    return {
        "inputs": _size(rng, most),
        "tapes": _size(rng, most),
        "unused": rng.choice((0, 0, 1, 5)),
        "dim": _size(rng, most),
        "hidden": _size(rng, most),
        "tape_hidden": _size(rng, most),
    }


def _norm_sizes(rng, slow):
    return {"rows": _size(rng, 40), "dim": max(1, _size(rng, 40 if slow else 300))}


def _compact_sizes(rng, slow):
    large = rng.random() < 0.05
    batch, most = _size(rng, 4), 400 if large else 12
    return {
        "input_lens": [_size(rng, most) for _ in range(batch)],
        "tape_lens": [_size(rng, most) for _ in range(batch)],
        "unused": rng.choice((0, 0, 1, 5)),
        "dim": _size(rng, 3 if large else 40 if slow else 200),
    }


def _accumulate_sizes(rng, slow):
    large = rng.random() < 0.05
    most = 300 if large else 20 if slow else 60
    return {
        "num_total": _size(rng, most),
        "num_rows": _size(rng, most),
        "dim": _size(rng, 3 if large else 40 if slow else 300),
    }


def _select_options(rng):
    return {
        "shared": rng.random() < 0.4,
        "halt_threshold": rng.choice((99.0, 1.0, 2.0, 0.3, 1.2, 0.0, -1.0, "inf", "-inf")),
        "average_query": rng.random() < 0.6,
        "loss_type": rng.choice(("entropy", "max")),
        "read_mask": rng.choice((None, None, 0.3, 0.9, 1.0, 0.0)),
        "bank_lens": rng.choice((None, None, [0], [rng.randint(0, 30) for _ in range(3)], [10**6])),
        "capacity": rng.random() < 0.5,
        "spare": rng.choice((0, 1, 7)),
    }


def _gather_options(rng):
    return {
        "shared": rng.random() < 0.4,
        "unused_index": rng.choice((-1, -1, 0, 10**6)),
        "capacity": rng.random() < 0.5,
        "spare": rng.choice((0, 1, 7)),
    }


def _attention_options(rng):
    return {
        "max_rows": rng.random() < 0.6,
        "spare": rng.choice((0, 1, 7)),
        "softmax_scale": rng.choice((None, None, 1.0, 0.1, -0.5, 0.0)),
    }


def _ffn_options(rng):
    return {
        "tape_ffn": rng.random() < 0.7,
        "counts_on_device": rng.random() < 0.25,
        "activation": rng.choice(("gelu_tanh", "gelu", "relu")),
        "cancel": rng.random() < 0.1,
    }


def _norm_options(rng):
    return {
        "eps": rng.choice((1e-6, 1e-6, 1e-5, 1e-12, 1.0, 0.0)),
        "float32_parameters": rng.random() < 0.3,
        "branch_dtype": rng.choice((None, None, None, "float32", "bfloat16", "float16", "float64")),
    }


def _compact_options(rng):
    return {
        "share": rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)),
        "capacity": rng.random() < 0.5,
        "spare": rng.choice((0, 1, 7)),
    }


def _accumulate_options(rng):
    return {
        "left_out": rng.choice((0.0, 0.0, 0.3, 1.0)),
        "ascending": rng.random() < 0.5,
        "wide_total": rng.random() < 0.3,
        "total_weights": rng.random() < 0.5,
    }


_SIZES = {
    "tape_select": _select_sizes,
    "tape_read": _select_sizes,
    "tape_gather": _gather_sizes,
    **dict.fromkeys(_ATTENTION, _attention_sizes),
    "dual_ffn": _ffn_sizes,
    "add_layer_norm": _norm_sizes,
    "compact_rows": _compact_sizes,
    "accumulate_rows": _accumulate_sizes,
    "accumulate_rows_": _accumulate_sizes,
}
_OPTIONS = {
    "tape_select": _select_options,
    "tape_read": _select_options,
    "tape_gather": _gather_options,
    **dict.fromkeys(_ATTENTION, _attention_options),
    "dual_ffn": _ffn_options,
    "add_layer_norm": _norm_options,
    "compact_rows": _compact_options,
    "accumulate_rows": _accumulate_options,
    "accumulate_rows_": _accumulate_options,
}
