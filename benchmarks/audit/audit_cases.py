"""What the audit compiles: each op, forward and backward, at sizes that pick all its kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.ops import ffn_products
from adatape_kernels.ops.op import operation

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)


@dataclass(frozen=True)
class AuditCase:
    """A call of one op's launchers on tensors without data."""

    name: str
    run: Callable[[], None]
    instructions: dict[str, tuple[str, ...]]
    """The instructions that each kernel's code must hold; "tensor" is the chip's matrix unit."""
    sample: bool = False
    """The tests compile the cases of the sample only."""

    def required(self, kernel: str, arch: int) -> tuple[str, ...]:
        """Return the instructions that a kernel must hold on a chip."""
        units = {90: "wgmma", 100: "tcgen05"}
        names = self.instructions.get(kernel, ())
        return tuple(units.get(arch, "mma") if name == "tensor" else name for name in names)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _launcher(op: str) -> Callable[..., Any]:
    """Return the function that serves an op in Triton, whatever the call."""
    return operation(op).implementations["triton"].function


def _select(
    shape: tuple[int, ...], batch: int, topk: int, dtype: torch.dtype, num_tape_tokens: int = 10
) -> None:
    key_dim = shape[-1]
    query, keys = torch.empty(batch, key_dim, dtype=dtype), torch.empty(shape, dtype=dtype)
    options = (num_tape_tokens, topk, 2.0, True, "entropy", None, None)
    weights, ponder, indices, counts = _launcher("tape_select")(query, keys, *options)
    for deterministic in (False, True):
        with _deterministic(deterministic):
            _launcher("tape_select_bwd")(
                query, keys, weights, ponder, indices, counts, True, "entropy"
            )


def _gather(
    shape: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    num_tape_tokens: int = 10,
    topk: int = 5,
) -> None:
    """Launch both ways of the segmented sum: with atomics, and the one that repeats its bits."""
    bank = torch.empty(shape, dtype=dtype)
    indices = torch.empty(batch, num_tape_tokens, topk, dtype=torch.int32)
    weights, counts = torch.empty(indices.shape), torch.empty(batch, dtype=torch.int32)
    tape, _ = _launcher("tape_gather")(bank, indices, weights, counts, num_tape_tokens * batch)
    for deterministic in (False, True):
        with _deterministic(deterministic):
            _launcher("tape_gather_bwd")(tape, bank, indices, weights, counts)


def _read(
    shape: tuple[int, ...],
    key_dim: int,
    batch: int,
    dtype: torch.dtype,
    num_tape_tokens: int = 10,
    topk: int = 5,
) -> None:
    """Launch what writes the gradient of a whole read, with atomics and in order."""
    query, bank = torch.empty(batch, key_dim, dtype=dtype), torch.empty(shape, dtype=dtype)
    indices = torch.empty(batch, num_tape_tokens, topk, dtype=torch.int32)
    weights, counts = torch.empty(indices.shape), torch.empty(batch, dtype=torch.int32)
    dtape = torch.empty(num_tape_tokens * batch, shape[-1], dtype=dtype)
    given = (query, bank, dtape, weights, torch.empty(batch), weights, indices, counts)
    for deterministic in (False, True):
        with _deterministic(deterministic):
            _launcher("tape_read_bwd")(*given, True, "entropy")


def _attention(head_dim: int, dtype: torch.dtype, num_heads: int = 6, rows: int = 207) -> None:
    batch = 256
    together = torch.empty(batch * rows, 3, num_heads, head_dim, dtype=dtype)
    q, k, v = together.unbind(1)
    offsets = torch.empty(2, batch + 1, dtype=torch.int32).unbind(0)
    out, lse = _launcher("elastic_attention")(q, k, v, *offsets, rows, None)
    _launcher("elastic_attention_bwd")(
        torch.empty_like(out), q, k, v, out, lse, *offsets, rows, None
    )


def _ffn(
    dim: int,
    hidden: int,
    tape_hidden: int,
    activation: str,
    products: str | None,
    dtype: torch.dtype,
    inputs: int = 50_000,
    tapes: int = 2_000,
) -> None:
    def parameters(wide: int, narrow: int) -> list[Tensor]:
        shapes = ((wide, dim), (wide,), (dim, narrow), (dim,))
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    x, bounds = torch.empty(inputs + tapes, dim, dtype=dtype), torch.empty(2, dtype=torch.int64)
    every = (*parameters(hidden, hidden), *parameters(2 * tape_hidden, tape_hidden))
    with ffn_products(products):
        y, *saved = _launcher("dual_ffn")(x, inputs, tapes, bounds, activation, *every)
        _launcher("dual_ffn_bwd")(y, x, *saved, inputs, bounds, activation, *every)


def _add_layer_norm(dim: int, dtype: torch.dtype, rows: int = 4096) -> None:
    x, weight = torch.empty(rows, dim, dtype=dtype), torch.empty(dim, dtype=dtype)
    total, normed, *saved = _launcher("add_layer_norm")(x, x, weight, weight, 1e-6)
    _launcher("add_layer_norm_bwd")(total, normed, total, weight, *saved)


def _compact_rows(dim: int, dtype: torch.dtype) -> None:
    rows, batch = 256 * 197, 256
    data, keep = torch.empty(rows, dim, dtype=dtype), torch.empty(rows, dtype=torch.bool)
    offsets = torch.empty(2, batch + 1, dtype=torch.int32).unbind(0)
    packed, _, _, source = _launcher("compact_rows")(data, keep, *offsets, rows // 2)
    _launcher("compact_rows_bwd")(packed, source, rows)


def _accumulate_rows(dim: int, dtype: torch.dtype, of_total: torch.dtype) -> None:
    total, rows = torch.empty(50000, dim, dtype=of_total), torch.empty(20000, dim, dtype=dtype)
    source, weights = torch.empty(20000, dtype=torch.int32), torch.empty(20000)
    for total_weights in (None, weights):
        factors = source, weights, total_weights
        _launcher("accumulate_rows")(total, rows, *factors)
        _launcher("accumulate_rows_")(total, rows, *factors)
        before = total if total_weights is not None else None
        _launcher("accumulate_rows_bwd")(total, before, rows, *factors)


def _select_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    for bank, shape, batch, topk in (
        ("input 784 × 64", (256, 784, 64), 256, 5),
        ("input 196 × 192", (256, 196, 192), 256, 5),
        ("input 784 × 384", (256, 784, 384), 256, 5),
        ("input 196 × 768", (256, 196, 768), 256, 5),
        ("input 5000 × 100", (8, 5000, 100), 8, 32),
        ("learn 10000 × 64", (10_000, 64), 256, 5),
        ("learn 100000 × 64", (100_000, 64), 256, 5),
        ("learn 500 × 24", (500, 24), 64, 1),
        ("learn 10000 × 768", (10_000, 768), 256, 2),
    ):
        # Of a longer key a program takes 64 examples, by the instruction that each chip has.
        on_tensor_cores = dtype in HALF and len(shape) == 2 and shape[-1] <= 128
        yield AuditCase(
            f"{bank}, k={topk}, {_short(dtype)}",
            partial(_select, shape, batch, topk, dtype),
            {"_tape_select_fwd_score_kernel": ("mma",)} if on_tensor_cores else {},
            sample=dtype == torch.bfloat16 and bank in ("input 784 × 64", "learn 10000 × 64"),
        )


def _gather_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    wide = {
        "_tape_gather_fwd_kernel": ("load128", "store128"),
        "_tape_gather_bwd_kernel": ("load128",),
        "_segment_sum_own_kernel": ("load128", "store128"),
        "_segment_sum_shared_kernel": ("load128", "store128"),
    }
    for bank, shape, batch in (
        ("input 784 × 384", (256, 784, 384), 256),
        ("learn 10000 × 768", (10_000, 768), 256),
        ("input 196 × 1000", (256, 196, 1000), 256),
        ("learn 500 × 50", (500, 50), 64),
    ):
        aligned = shape[-1] * dtype.itemsize % 16 == 0
        yield AuditCase(
            f"{bank}, {_short(dtype)}",
            partial(_gather, shape, batch, dtype),
            wide if aligned else {},
            sample=dtype == torch.bfloat16 and aligned,
        )


def _read_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    for bank, shape, key_dim, batch in (
        ("input 784 × 384", (256, 784, 384), 64, 256),
        ("input 196 × 768", (256, 196, 768), 768, 256),
        ("learn 10000 × 768", (10_000, 768), 768, 256),
        ("learn 500 × 50", (500, 50), 24, 64),
    ):
        yield AuditCase(
            f"read {bank}, K={key_dim}, {_short(dtype)}",
            partial(_read, shape, key_dim, batch, dtype),
            {},
            sample=dtype == torch.bfloat16 and batch == 256,
        )


def _attention_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    kernels = ("_elastic_attention_fwd_kernel", "_elastic_attention_bwd_kernel")
    for head_dim in (8, 24, 32, 64, 80, 96, 128):
        yield AuditCase(
            f"{head_dim} a head, {_short(dtype)}",
            partial(_attention, head_dim, dtype),
            dict.fromkeys(kernels, ("tensor", "load128")) if dtype in HALF else {},
            sample=dtype == torch.bfloat16 and head_dim == 64,
        )


def _ffn_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    kernels = ("_dual_ffn_up_kernel", "_dual_ffn_down_kernel", "_dual_ffn_weight_kernel")
    for products in ("grouped", "epilogue", "cublas"):
        for dim, hidden, tape_hidden, activation in (
            (384, 1536, 768, "gelu_tanh"),
            (384, 1536, 768, "gelu"),
            (384, 1536, 768, "relu"),
            (100, 200, 60, "gelu_tanh"),
        ):
            on_tensor_cores = dtype in HALF and dim == 384
            form = "" if activation == "gelu_tanh" else f" ({activation})"
            yield AuditCase(
                f"{dim} × {hidden}{form}, {tape_hidden}, {products}, {_short(dtype)}",
                partial(_ffn, dim, hidden, tape_hidden, activation, products, dtype),
                dict.fromkeys(kernels, ("tensor",)) if on_tensor_cores else {},
                sample=dtype == torch.bfloat16
                and dim == 384
                and activation
                in (("gelu_tanh",) if products == "epilogue" else ("gelu_tanh", "gelu")),
            )


def _add_layer_norm_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    for dim in (192, 384, 768, 1000):
        yield AuditCase(
            f"dim {dim}, {_short(dtype)}",
            partial(_add_layer_norm, dim, dtype),
            {},
            sample=dtype == torch.bfloat16 and dim == 384,
        )


def _compact_rows_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    wide = dict.fromkeys(
        ("_compact_rows_copy_kernel", "_compact_rows_bwd_kernel"), ("load128", "store128")
    )
    for dim in (768, 50):
        aligned = dim * dtype.itemsize % 16 == 0
        yield AuditCase(
            f"rows of {dim}, {_short(dtype)}",
            partial(_compact_rows, dim, dtype),
            wide if aligned else {},
            sample=dtype == torch.bfloat16 and aligned,
        )


def _accumulate_rows_cases(dtype: torch.dtype) -> Iterator[AuditCase]:
    kernels = ("_accumulate_rows_fwd_kernel", "_accumulate_rows_bwd_kernel")
    for dim in (768, 50):
        aligned = dim * dtype.itemsize % 16 == 0
        for of_total in dict.fromkeys((dtype, torch.float32)):
            into = "" if of_total == dtype else " into fp32"
            yield AuditCase(
                f"rows of {dim}, {_short(dtype)}{into}",
                partial(_accumulate_rows, dim, dtype, of_total),
                dict.fromkeys(kernels, ("load128", "store128"))
                if aligned and of_total == dtype
                else {},
                sample=dtype == torch.bfloat16 and aligned and of_total == dtype,
            )


def _small_model() -> None:
    """Launch what S/16 launches for 256 images: an input-driven bank, 10 tape tokens."""
    dtype, rows = torch.bfloat16, 256 * 207
    _select((256, 784, 384), 256, 5, dtype)
    _gather((256, 784, 384), 256, dtype)
    _read((256, 784, 384), 384, 256, dtype)
    _attention(64, dtype)
    _ffn(384, 1536, 384, "gelu_tanh", None, dtype, 256 * 197, 256 * 10)
    _add_layer_norm(384, dtype, rows)


def _base_model() -> None:
    """Launch what B/32 launches for 256 images: a learnable bank, 64 tape tokens."""
    dtype, rows = torch.bfloat16, 256 * 114
    _select((10_000, 768), 256, 2, dtype, 64)
    _gather((10_000, 768), 256, dtype, 64, 2)
    _read((10_000, 768), 768, 256, dtype, 64, 2)
    _attention(64, dtype, num_heads=12, rows=114)
    _ffn(768, 3072, 768, "gelu_tanh", None, dtype, 256 * 50, 256 * 64)
    _add_layer_norm(768, dtype, rows)


MODEL_CASES = (
    AuditCase("S/16, B=256, bf16", _small_model, {}),
    AuditCase("B/32, B=256, bf16", _base_model, {}),
)
"""What two models launch, whose waves are held to bounds."""

CASES = MODEL_CASES + tuple(
    case
    for dtype in DTYPES
    for cases in (
        _select_cases,
        _gather_cases,
        _read_cases,
        _attention_cases,
        _ffn_cases,
        _add_layer_norm_cases,
        _compact_rows_cases,
        _accumulate_rows_cases,
    )
    for case in cases(dtype)
)
