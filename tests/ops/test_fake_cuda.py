"""Where no GPU is: what the ops promise to the compiler for CUDA tensors, forward and backward.

Fake tensors have a device and a shape but no data, so nothing here may ask for a value: an op that
copied a number to the host would fail. A CPU build of torch cannot run autograd over them, nor
slice them, so the backward ops are called themselves, and tape_read and models are left to the GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adatape_kernels.ops import (
    FFN,
    add_layer_norm,
    dual_ffn,
    elastic_attention,
    tape_gather,
    tape_select,
)

BATCH, BANK, KEY, DIM, STEPS, TOPK = 3, 20, 8, 16, 4, 2
WIDE = torch.float32
HALVES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.parametrize("dtype", HALVES, ids=str)


def on_gpu(x, shape, dtype):
    assert (tuple(x.shape), x.dtype, x.device.type) == (shape, dtype, "cuda")
    assert x.is_contiguous()


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.fixture
def make(dtype):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    return empty


@pytest.mark.parametrize("bank", [(BANK,), (BATCH, BANK)], ids=["learnable", "input-driven"])
def test_reading(make, dtype, bank):
    query, keys, values = make(BATCH, KEY), make(*bank, KEY), make(*bank, DIM)
    options = dict(num_tape_tokens=STEPS, topk=TOPK, halt_threshold=1.0)
    read = tape_select(query, keys, **options)
    reads = (BATCH, STEPS, TOPK)
    on_gpu(read.indices, reads, torch.int32)
    on_gpu(read.weights, reads, WIDE)
    on_gpu(read.counts, (BATCH,), torch.int32)
    on_gpu(read.ponder, (BATCH,), WIDE)
    chosen = read.indices, read.weights, read.counts
    tape, offsets = tape_gather(values, *chosen, capacity=7)
    on_gpu(tape, (7, DIM), dtype)
    on_gpu(offsets, (BATCH + 1,), torch.int32)

    dquery, dkeys = torch.ops.adatape.tape_select_bwd(
        query, keys, read.weights, read.ponder, read.indices, read.counts, True, "entropy"
    )
    on_gpu(dquery, (BATCH, KEY), dtype)
    on_gpu(dkeys, (*bank, KEY), dtype)
    dbank, dweights = torch.ops.adatape.tape_gather_bwd(tape, values, *chosen)
    on_gpu(dbank, (*bank, DIM), dtype)
    on_gpu(dweights, reads, WIDE)


def test_residual_norm(make, dtype):
    x, weight = make(12, DIM), make(DIM)
    total, normed = add_layer_norm(x, x, weight, weight)
    on_gpu(total, (12, DIM), dtype)
    on_gpu(normed, (12, DIM), dtype)
    statistics = make(12, dtype=WIDE), make(12, dtype=WIDE)
    dx, *grads = torch.ops.adatape.add_layer_norm_bwd(total, normed, total, weight, *statistics)
    on_gpu(dx, (12, DIM), dtype)
    for grad in grads:
        assert (tuple(grad.shape), grad.device.type) == ((DIM,), "cuda")


def test_attention(make, dtype):
    q, k, v = make(12, 3, 2, KEY).unbind(1)
    offsets = make(BATCH + 1, dtype=torch.int32), make(BATCH + 1, dtype=torch.int32)
    out = elastic_attention(q, k, v, *offsets, max_rows=9)
    on_gpu(out, (12, 2, KEY), dtype)
    lse = make(2, 12, dtype=WIDE)
    for grad in torch.ops.adatape.elastic_attention_bwd(out, q, k, v, out, lse, *offsets, 9, None):
        on_gpu(grad, (12, 2, KEY), dtype)


@pytest.mark.parametrize("where", ["host", "device"])
def test_feed_forwards(make, dtype, where):
    x, rows = make(12, DIM), (9, 11)
    if where == "device":
        rows = make(dtype=torch.int32), make(dtype=torch.int64)
    ffn = FFN(make(24, DIM), make(24), make(DIM, 24), make(DIM))
    tape_ffn = FFN(make(40, DIM), make(40), make(DIM, 20), make(DIM))
    y = dual_ffn(x, rows[0], ffn, tape_ffn, num_rows=rows[1])
    on_gpu(y, (12, DIM), dtype)
    if where == "host":
        saved, split = (make(9, 24), make(3, 40)), (9, None)
    else:
        saved, split = (make(12, 24), make(12, 40)), (None, make(2, dtype=torch.int64))
    dx, *grads = torch.ops.adatape.dual_ffn_bwd(y, x, *saved, *split, "gelu_tanh", *ffn, *tape_ffn)
    on_gpu(dx, (12, DIM), dtype)
    for grad, parameter in zip(grads, (*ffn, *tape_ffn), strict=True):
        on_gpu(grad, tuple(parameter.shape), dtype)
