"""A small valid call of every op, backward ones included, on the CPU, as torch.ops takes it."""

import torch

from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops.op import operation, registered_ops

OPS = [name for name in registered_ops() if not name.startswith("_")]
BATCH, BANK, KEY_DIM, DIM, TOKENS, TOPK = 2, 5, 4, 8, 3, 2
_FORWARD = {}


def names_of(op):
    """The arguments' names, in the order of the schema."""
    overload = getattr(torch.ops.adatape, op).default
    return [argument.name for argument in overload._schema.arguments]


def call_of(op, dtype, *, own_banks=True, head_dim=8):
    """The arguments of a call that every backend takes which takes its dtype."""
    if op == "tape_read_bwd":
        return _read_bwd(call_of("tape_select", dtype, own_banks=own_banks))
    if op.endswith("_bwd"):
        forward = op.removesuffix("_bwd")
        args = call_of(forward, dtype, own_banks=own_banks, head_dim=head_dim)
        results = operation(forward).implementations["eager"].function(*args)
        return _BACKWARD[forward](args, results)
    torch.manual_seed(0)
    return _FORWARD[op](dtype, own_banks, head_dim)


def _forward(make):
    _FORWARD[make.__name__] = make
    return make


@_forward
def tape_select(dtype, own_banks, head_dim):
    query = torch.randn(BATCH, KEY_DIM).to(dtype)
    keys = torch.randn(*([BATCH] if own_banks else []), BANK, KEY_DIM).to(dtype)
    read_mask = torch.zeros(BATCH, BANK, dtype=torch.bool)
    read_mask[0, 1] = True
    bank_lens = torch.tensor([5, 4])
    return [query, keys, TOKENS, TOPK, 1.0, True, "entropy", read_mask, bank_lens]


@_forward
def tape_gather(dtype, own_banks, head_dim):
    bank = torch.randn(*([BATCH] if own_banks else []), BANK, DIM).to(dtype)
    indices = torch.randint(BANK, (BATCH, TOKENS, TOPK), dtype=torch.int32)
    weights = torch.rand(BATCH, TOKENS, TOPK, dtype=wide_dtype(dtype))
    return [bank, indices, weights, torch.tensor([3, 1], dtype=torch.int32), 6]


@_forward
def elastic_attention(dtype, own_banks, head_dim):
    q, k, v = torch.randn(3, 7, 2, head_dim).to(dtype).unbind(0)
    cu_inputs = torch.tensor([0, 2, 4], dtype=torch.int32)
    cu_tapes = torch.tensor([4, 5, 6], dtype=torch.int32)
    return [q, k, v, cu_inputs, cu_tapes, 4, 0.5]


@_forward
def elastic_attention_qkvpacked(dtype, own_banks, head_dim):
    q, k, v, *rest = elastic_attention(dtype, own_banks, head_dim)
    return [torch.stack([q, k, v], 1), *rest]


@_forward
def dual_ffn(dtype, own_banks, head_dim):
    shapes = (6, DIM), (6,), (DIM, 6), (DIM,), (8, DIM), (8,), (DIM, 4), (DIM,)
    parameters = [torch.randn(*shape).to(dtype) for shape in shapes]
    bounds = torch.tensor([4, 6])
    return [torch.randn(7, DIM).to(dtype), 4, 3, bounds, "gelu_tanh", *parameters]


@_forward
def add_layer_norm(dtype, own_banks, head_dim):
    x, branch = torch.randn(2, 3, DIM).to(dtype).unbind(0)
    return [x, branch, torch.rand(DIM).to(dtype), torch.randn(DIM).to(dtype), 1e-6]


@_forward
def compact_rows(dtype, own_banks, head_dim):
    keep = torch.tensor([True, False, True, True, False, True, True])
    cu_inputs = torch.tensor([0, 2, 4], dtype=torch.int32)
    cu_tapes = torch.tensor([4, 5, 6], dtype=torch.int32)
    return [torch.randn(7, DIM).to(dtype), keep, cu_inputs, cu_tapes, 6]


@_forward
def accumulate_rows(dtype, own_banks, head_dim):
    total, rows = torch.randn(5, DIM).to(dtype), torch.randn(4, DIM).to(dtype)
    source = torch.tensor([3, 0, -1, 4], dtype=torch.int32)
    weights, total_weights = torch.rand(2, 4, dtype=wide_dtype(dtype)).unbind(0)
    return [total, rows, source, weights, total_weights]


_FORWARD["accumulate_rows_"] = accumulate_rows


def _select_bwd(args, results):
    query, keys, _, _, _, average_query, loss_type, _, _ = args
    weights, ponder, indices, counts = results
    given = torch.randn_like(weights), torch.randn_like(ponder)
    return [query, keys, *given, indices, counts, average_query, loss_type]


def _read_bwd(args):
    results = operation("tape_select").implementations["eager"].function(*args)
    query, keys, dweights, dponder, indices, *rest = _select_bwd(args, results)
    bank = torch.cat([keys, torch.randn(*keys.shape[:-1], DIM - KEY_DIM).to(keys.dtype)], -1)
    dtape = torch.randn(BATCH * TOKENS, DIM).to(keys.dtype)
    return [query, bank, dtape, dweights, dponder, results[0], indices, *rest]


def _attention_bwd(args, results):
    q, k, v, *rest = args
    return [torch.randn_like(q), q, k, v, *results, *rest]


def _packed_bwd(args, results):
    qkv, *rest = args
    return [torch.randn_like(results[0]), qkv, *results, *rest]


def _ffn_bwd(args, results):
    x, num_input_rows, _, *rest = args
    _, hidden, tape_hidden = results
    return [torch.randn_like(x), x, hidden, tape_hidden, num_input_rows, *rest]


def _norm_bwd(args, results):
    total, _, mean, rstd = results
    return [torch.randn_like(total), torch.randn_like(total), total, args[2], mean, rstd]


_BACKWARD = {
    "tape_select": _select_bwd,
    "tape_gather": lambda args, results: [torch.randn_like(results[0]), *args[:4]],
    "elastic_attention": _attention_bwd,
    "elastic_attention_qkvpacked": _packed_bwd,
    "dual_ffn": _ffn_bwd,
    "add_layer_norm": _norm_bwd,
    "compact_rows": lambda args, results: [torch.randn_like(results[0]), results[3], len(args[0])],
    "accumulate_rows": lambda args, results: [torch.randn_like(results), *args],
}
