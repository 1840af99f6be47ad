"""Calls of `elastic_attention` for its tests, and what they compare."""

import torch

from adatape_kernels import reference
from adatape_kernels.offsets import cumulative
from adatape_kernels.ops.device_facts import facts_of
from adatape_kernels.ops.elastic_attention.compiled import most_rows
from adatape_kernels.ops.op import meta, operation

INPUT_LENS, TAPE_LENS = [4, 0, 3, 1, 0], [2, 3, 0, 1, 0]


def layout(device, input_lens=INPUT_LENS, tape_lens=TAPE_LENS, unused=0):
    """cu_inputs, cu_tapes, and the physical rows of each example."""
    cu_inputs = cumulative(torch.tensor(input_lens, dtype=torch.int32, device=device))
    tapes = torch.tensor(tape_lens, dtype=torch.int32, device=device)
    cu_tapes = cumulative(tapes, start=sum(input_lens))
    rows, (a, b) = [], (cu_inputs.tolist(), cu_tapes.tolist())
    for i in range(len(input_lens)):
        rows.append([*range(a[i], a[i + 1]), *range(b[i], b[i + 1])])
    return cu_inputs, cu_tapes, rows


def qkv(rows, num_heads, head_dim, *, device, dtype=torch.float32):
    """Strided views of one product, as the layer has them, and a gradient of the output."""
    together = torch.randn(rows, 3, num_heads, head_dim, device=device).to(dtype)
    dout = torch.randn(rows, num_heads, head_dim, device=device).to(dtype)
    return [*together.unbind(1), dout]


def most_rows_on(device):
    """The longest example that CUDA C++ serves on the device."""
    return most_rows(facts_of(torch.device(device)))


def gradients(attention, q, k, v, dout, *offsets, **options):
    """out, dq, dk and dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, *offsets, **options)
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], dout)]


def by_reference(*args, **options):
    return reference.elastic_attention(*args, **options)[0]


def not_served(
    device, backend, dtype=torch.float32, head_dim=8, max_rows=None, shape=None, **parameters
):
    """For `absent_if`: why a backend does not serve the calls that a test's parameters make."""
    if backend is None:
        return None
    rows = meta(9, 2, shape[1] if shape else head_dim, dtype=dtype)
    offsets = meta(3, dtype=torch.int32)
    args = rows, rows, rows, offsets, offsets, max_rows, None
    return operation("elastic_attention").refusal(backend, args, device)
