"""The arguments of a valid call of each op, by name, in the order of the public function."""

import itertools

import torch

from adatape_kernels.op_types import FFN, wide_dtype
from fuzz.op_tensors import floats, generator_of, laid_out

OPS = (
    "tape_select", "tape_gather", "tape_read", "elastic_attention", "elastic_attention_qkvpacked",
    "dual_ffn", "add_layer_norm", "compact_rows", "accumulate_rows", "accumulate_rows_",
)  # fmt: skip


class Maker:
    """Makes the tensors of a case, with the values and strides that it names."""

    def __init__(self, case):
        self.case = case
        self.generator = generator_of(case)
        self.dtype = getattr(torch, case["dtype"])

    def floats(self, name, *shape, dtype=None):
        values = self.case["values"].get(name, "normal")
        x = floats(shape, dtype or self.dtype, values, self.generator)
        return self.placed(name, x)

    def heads(self, name, rows, num_heads, head_dim, shape=None):
        """Return (rows, num_heads, head_dim), or what else is said of as many numbers.

        The patterns of values follow the rows.
        """
        values = self.case["values"].get(name, "normal")
        x = floats((num_heads, rows, head_dim), self.dtype, values, self.generator)
        x = x.transpose(0, 1).contiguous()
        return self.placed(name, x if shape is None else x.view(shape))

    def integers(self, name, values, shape, dtype=torch.int32):
        return self.placed(name, torch.tensor(values, dtype=torch.int64).view(shape).to(dtype))

    def placed(self, name, x):
        return laid_out(x, self.case["layouts"].get(name, "contiguous"))

    def index_dtype(self):
        return getattr(torch, self.case["options"].get("index_dtype") or "int32")


def arguments(case):
    """Return a call's arguments by name; what the case breaks is not broken yet."""
    return _MAKERS[case["op"]](Maker(case), case["sizes"], case["options"])


def _select(make, sizes, options, keys_name="keys", width=None):
    batch, bank_size = sizes["batch"], max(1, sizes["bank_size"])
    key_dim, topk = max(1, sizes["key_dim"]), max(1, min(sizes["topk"], bank_size))
    own = [] if options["shared"] else [batch]
    read_mask = bank_lens = None
    query = make.floats("query", batch, key_dim)
    keys = make.floats(keys_name, *own, bank_size, width or key_dim)
    if options["read_mask"] is not None:
        chance = torch.rand(batch, bank_size, generator=make.generator)
        read_mask = make.placed("read_mask", chance < options["read_mask"])
    if options["bank_lens"] is not None:
        lens = [min(n, bank_size) for n in itertools.islice(_cycle(options["bank_lens"]), batch)]
        bank_lens = make.integers("bank_lens", lens, (batch,), make.index_dtype())
    return {
        "query": query,
        keys_name: keys,
        "num_tape_tokens": sizes["num_tape_tokens"],
        "topk": topk,
        "halt_threshold": float(options["halt_threshold"]),
        "average_query": options["average_query"],
        "loss_type": options["loss_type"],
        "read_mask": read_mask,
        "bank_lens": bank_lens,
    }


def _read(make, sizes, options):
    width = max(1, sizes["key_dim"]) + sizes["further"]
    call = _select(make, sizes, options, "bank", width)
    most = sizes["batch"] * sizes["num_tape_tokens"]
    call["capacity"] = most + options["spare"] if options["capacity"] else None
    return call


def _gather(make, sizes, options):
    counts, steps, topk = sizes["counts"], sizes["num_tape_tokens"], sizes["topk"]
    counts = [min(n, steps) for n in counts]
    batch, bank_size = len(counts), sizes["bank_size"]
    shape = (batch, steps, topk)
    if not bank_size:
        counts = [0] * batch
    bank = make.floats("bank", *([] if options["shared"] else [batch]), bank_size, sizes["dim"])
    indices = torch.randint(max(1, bank_size), shape, generator=make.generator)
    unused = torch.arange(steps) >= torch.tensor(counts, dtype=torch.int64).view(-1, 1)
    indices = indices.masked_fill(unused.unsqueeze(2), options["unused_index"])
    indices = make.placed("indices", indices.to(make.index_dtype()))
    weights = make.floats("weights", *shape, dtype=wide_dtype(make.dtype))
    counts_tensor = make.integers("counts", counts, (batch,), make.index_dtype())
    capacity = int(counts_tensor.sum()) + options["spare"] if options["capacity"] else None
    return {
        "bank": bank, "indices": indices, "weights": weights, "counts": counts_tensor,
        "capacity": capacity,
    }  # fmt: skip


def _offsets(make, sizes):
    """Return both offsets by name, and the number of rows that there are, unused ones too."""
    inputs, tapes = sizes["input_lens"], sizes["tape_lens"]
    batch = min(len(inputs), len(tapes))
    cu_inputs = [0, *itertools.accumulate(inputs[:batch])]
    cu_tapes = list(itertools.accumulate(tapes[:batch], initial=cu_inputs[-1]))
    bounds = {"cu_inputs": cu_inputs, "cu_tapes": cu_tapes}
    dtype = make.index_dtype()
    made = {name: make.integers(name, each, (batch + 1,), dtype) for name, each in bounds.items()}
    return made, cu_tapes[-1] + sizes["unused"]


def _attention(make, sizes, options, packed=False):
    offsets, rows = _offsets(make, sizes)
    pairs = zip(sizes["input_lens"], sizes["tape_lens"], strict=False)
    longest = max((a + b for a, b in pairs), default=0)
    num_heads, head_dim = sizes["num_heads"], max(1, sizes["head_dim"])
    if packed:
        qkv = make.heads("qkv", rows, 3 * num_heads, head_dim, shape=(rows, 3, num_heads, head_dim))
        projections = {"qkv": qkv}
    else:
        projections = {name: make.heads(name, rows, num_heads, head_dim) for name in "qkv"}
    return {
        **projections,
        **offsets,
        "max_rows": longest + options["spare"] if options["max_rows"] else None,
        "softmax_scale": options["softmax_scale"],
    }


def _packed_attention(make, sizes, options):
    return _attention(make, sizes, options, packed=True)


def _ffn(make, sizes, options):
    inputs, tapes, dim = sizes["inputs"], sizes["tapes"], sizes["dim"]

    def parameters(name, hidden, gates):
        shapes = (gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,)
        return FFN(
            *(
                make.floats(f"{name}.{field}", *shape)
                for field, shape in zip(FFN._fields, shapes, strict=True)
            )
        )

    def count(n):
        return torch.tensor(n, dtype=make.index_dtype()) if options["counts_on_device"] else n

    x = make.floats("x", inputs + tapes + sizes["unused"], dim)
    own, of_tape = parameters("input_ffn", sizes["hidden"], 1), None
    if options["tape_ffn"]:
        of_tape = parameters("tape_ffn", sizes["tape_hidden"], 2)
    if options["cancel"] and len(x):
        # Where all rows are one, a bias can take away what the product gives but for its rounding.
        x = x[:1].clone().expand(x.shape).contiguous()
        own, of_tape = (ffn and _cancelling(x[0], ffn) for ffn in (own, of_tape))
    return {
        "x": x,
        "num_input_rows": count(inputs),
        "input_ffn": own,
        "tape_ffn": of_tape,
        "num_rows": count(inputs + tapes),
        "activation": options["activation"],
    }


def _cancelling(row, ffn):
    product = ffn.w1.double() @ row.double()
    return ffn._replace(b1=-product.to(row.dtype), b2=torch.zeros_like(ffn.b2))


def _norm(make, sizes, options):
    dim = max(1, sizes["dim"])
    shape = sizes["rows"], dim
    parameters = torch.float32 if options["float32_parameters"] else make.dtype
    branch = getattr(torch, options["branch_dtype"]) if options["branch_dtype"] else make.dtype
    return {
        "x": make.floats("x", *shape),
        "branch": make.floats("branch", *shape, dtype=branch),
        "weight": make.floats("weight", dim, dtype=parameters),
        "bias": make.floats("bias", dim, dtype=parameters),
        "eps": options["eps"],
    }


def _compact(make, sizes, options):
    offsets, rows = _offsets(make, sizes)
    chance = torch.rand(rows, generator=make.generator)
    keep = make.placed("keep", chance < options["share"])
    kept = int(keep[: int(offsets["cu_tapes"][-1])].sum())
    return {
        "data": make.floats("data", rows, sizes["dim"]),
        "keep": keep,
        **offsets,
        "capacity": kept + options["spare"] if options["capacity"] else None,
    }


def _accumulate(make, sizes, options):
    num_total, num_rows, dim = sizes["num_total"], sizes["num_rows"], sizes["dim"]
    wide = wide_dtype(make.dtype)
    places = torch.randperm(max(num_total, num_rows), generator=make.generator)[:num_rows]
    left_out = torch.rand(num_rows, generator=make.generator) < options["left_out"]
    source = places.masked_fill(left_out | (places >= num_total), -1)
    if options["ascending"]:
        source = source.sort().values
    weights = {"weights": make.floats("weights", num_rows, dtype=wide), "total_weights": None}
    if options["total_weights"]:
        weights["total_weights"] = make.floats("total_weights", num_rows, dtype=wide)
    return {
        "total": make.floats(
            "total", num_total, dim, dtype=wide if options["wide_total"] else make.dtype
        ),
        "rows": make.floats("rows", num_rows, dim),
        "source": make.placed("source", source.to(make.index_dtype())),
        **weights,
    }


def _cycle(values):
    return itertools.cycle(values or [0])


_MAKERS = {
    "tape_select": _select,
    "tape_gather": _gather,
    "tape_read": _read,
    "elastic_attention": _attention,
    "elastic_attention_qkvpacked": _packed_attention,
    "dual_ffn": _ffn,
    "add_layer_norm": _norm,
    "compact_rows": _compact,
    "accumulate_rows": _accumulate,
    "accumulate_rows_": _accumulate,
}
