"""Tells what each op must move and compute, and what our Triton kernels do.

    python -m adatape_kernels.benchmarks.audit.roofline --quick

The kernels run in triton's interpreter with every load, store and product counted, on one example
(or a few) of each shape; the counts are scaled to the whole batch. Beside them stands what the
algorithm needs at least, and the time that an H200 would need for that: 4.8 TB/s, 989 TFLOP/s in
bfloat16. float16 stands in for bfloat16, which has the same size and which the interpreter lacks.

Columns: `memory` counts each 32-byte sector that a launch touches once, as a cache that holds
everything would; `L2` counts every access, as if a multiprocessor kept nothing; both relative to
the algorithm's bytes, like `products` to its FLOPs. `ratio` compares the times that the H200 would
need for memory and products, ours and the algorithm's.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime import interpreter

from adatape_kernels.benchmarks.audit.again import start_again
from adatape_kernels.ops import ffn_products, triton_runtime
from adatape_kernels.ops.op import operation

MODULE = "adatape_kernels.benchmarks.audit.roofline"
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.8e12, 989e12
SECTOR = 32
LIMIT = 1.3
"""The most that `ratio` may be for gathering, and for attention at 50 to 256 rows."""


@dataclass
class CountedWork:
    """Bytes that pass between chip and memory, FLOPs of products, and all bytes accessed."""

    bytes: float = 0
    flops: float = 0
    accessed: float = 0

    def plus(self, other: "CountedWork", times: float = 1) -> "CountedWork":
        """Return this work and so many times the other."""
        return CountedWork(
            self.bytes + times * other.bytes,
            self.flops + times * other.flops,
            self.accessed + times * other.accessed,
        )

    @property
    def seconds(self) -> float:
        """The least time in which an H200 can do this."""
        return max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


_CHECKS = ("lt", "gt", "ge", "le", "eq", "any", "__or__", "bitwise_or", "index", "nonzero", "item")


@dataclass
class _WorkCounter(TorchDispatchMode):
    """Counts what the interpreter does, launch by launch, and torch's own kernels around it."""

    work: CountedWork = field(default_factory=CountedWork)
    sectors: list[np.ndarray] = field(default_factory=list)
    interpreting: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        # The interpreter's own copies do not count, nor checks of values, which only a CPU has.
        if self.interpreting or function.is_view or "empty" in name or name in _CHECKS:
            return result
        # A kernel reads each tensor that it is given, save for a fill, and writes what it returns.
        fills = name.startswith("new_") or name.endswith("_like")
        given = () if fills else (args, kwargs)
        read = [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, Tensor)]
        written = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in (*read, *written))
        self.work.bytes += moved
        self.work.accessed += moved
        if function.overloadpacket in flop_registry:
            self.work.flops += flop_registry[function.overloadpacket](
                *args, **kwargs, out_val=result
            )
        return result

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        places = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64).ravel()
        self.work.accessed += places.size * size
        self.sectors.append(np.unique(places // SECTOR))

    def end_launch(self) -> None:
        if self.sectors:
            self.work.bytes += SECTOR * np.unique(np.concatenate(self.sectors)).size
        self.sectors.clear()


@contextmanager
def counting() -> Iterator[CountedWork]:
    """Count the work of every kernel that runs inside."""
    counter, builder = _WorkCounter(), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    add, dot = builder.create_atomic_rmw, builder.create_dot
    run = interpreter.GridExecutor.__call__

    def counted_load(pointers, mask, *rest):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(pointers, value, mask, *rest)

    def counted_add(operation, pointers, value, mask, *rest):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return add(operation, pointers, value, mask, *rest)

    def counted_dot(a, b, d, *rest):
        counter.work.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, d, *rest)

    def counted_run(self, *args, **options):
        counter.interpreting = True
        try:
            return run(self, *args, **options)
        finally:
            counter.interpreting = False
            counter.end_launch()

    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
    functions = (counted_load, counted_store, counted_add, counted_dot)
    try:
        for name, function in zip(names, functions, strict=True):
            setattr(builder, name, function)
        interpreter.GridExecutor.__call__ = counted_run
        with counter:
            yield counter.work
    finally:
        for name in names:
            delattr(builder, name)
        interpreter.GridExecutor.__call__ = run


@dataclass
class RooflineLine:
    """The work of one op at one shape: what the algorithm needs, and what ours does."""

    op: str
    shape: str
    needed: CountedWork
    ours: CountedWork
    limited: bool = False
    """If this is set, `ratio` may not pass LIMIT."""

    @property
    def ratio(self) -> float:
        return self.ours.seconds / self.needed.seconds

    def text(self) -> str:
        needed, ours = self.needed, self.ours
        bound = "memory" if needed.bytes / BYTES_PER_SECOND >= needed.seconds else "products"
        products = f"{ours.flops / needed.flops:9.2f}" if needed.flops and ours.flops else f"{'':9}"
        over = "  OVER" if self.limited and self.ratio > LIMIT else ""
        return (
            f"{self.op:22}{self.shape:46}{needed.flops / 1e9:9.2f}{needed.bytes / 1e6:9.1f}"
            f"{needed.seconds * 1e6:9.1f}  {bound:9}{ours.bytes / needed.bytes:8.2f}"
            f"{ours.accessed / needed.bytes:8.2f}{products}{self.ratio:8.2f}{over}"
        )


def measured(op: str, *arguments: object) -> tuple[CountedWork, tuple[Tensor, ...]]:
    """Run one op's Triton launcher, counted; return its work and its results."""
    with counting() as work:
        results = operation(op).implementations["triton"].function(*arguments)
    return work, results


HALF = torch.float16
SIZE = HALF.itemsize


def attention(
    lens: Sequence[int], repeats: float, heads: int, head_dim: int
) -> Iterator[RooflineLine]:
    """Count one head of an example of each length, and scale that to the batch and all heads."""
    works = {
        "elastic_attention": (CountedWork(), CountedWork()),
        "elastic_attention_bwd": (CountedWork(), CountedWork()),
    }
    for rows in lens:
        tape = min(10, rows - 1)
        q, k, v, dout = torch.randn(4, rows, 1, head_dim).to(HALF).unbind(0)
        cu_inputs = torch.tensor([0, rows - tape], dtype=torch.int32)
        offsets = cu_inputs, torch.tensor([rows - tape, rows], dtype=torch.int32)
        forward, (out, lse) = measured("elastic_attention", q, k, v, *offsets, rows, None)
        backward, _ = measured(
            "elastic_attention_bwd", dout, q, k, v, out, lse, *offsets, rows, None
        )
        # The forward moves q, k, v and out and has two products; the backward moves these, dout and
        # three gradients and has five.
        moved, product = rows * head_dim * SIZE, 2 * rows * rows * head_dim
        times = repeats * heads / len(lens)
        for name, ours, tensors, products in (
            ("elastic_attention", forward, 4, 2),
            ("elastic_attention_bwd", backward, 8, 5),
        ):
            needed, so_far = works[name]
            here = CountedWork(tensors * moved, products * product)
            works[name] = needed.plus(here, times), so_far.plus(ours, times)
    span = str(lens[0]) if len(lens) == 1 else f"{min(lens)} to {max(lens)}"
    shape = f"B={repeats:g}, {span} rows, {heads} heads of {head_dim}"
    for name, (needed, ours) in works.items():
        yield RooflineLine(name, shape, needed, ours, limited=max(lens) <= 256)


def reading(
    batch: int,
    bank_size: int,
    dim: int,
    key_dim: int,
    topk: int,
    num_tape_tokens: int,
    shared: bool,
) -> Iterator[RooflineLine]:
    """Select and gather, forward and backward; no example halts before its tape is full."""
    wide = (bank_size, dim)
    bank = torch.randn(wide if shared else (batch, *wide)).to(HALF)
    query, keys = torch.randn(batch, key_dim).to(HALF), bank[..., :key_dim].contiguous()
    options = (num_tape_tokens, topk, float(num_tape_tokens), True, "entropy", None, None)
    select, (weights, ponder, indices, counts) = measured("tape_select", query, keys, *options)
    select_bwd, _ = measured(
        "tape_select_bwd", query, keys, weights, ponder, indices, counts, True, "entropy"
    )
    gather, (tape, _) = measured(
        "tape_gather", bank, indices, weights, counts, num_tape_tokens * batch
    )
    gather_bwd, _ = measured("tape_gather_bwd", tape, bank, indices, weights, counts)

    # Each entry that is read has an index and a weight of 4 bytes.
    read = num_tape_tokens * topk * batch
    offset = 0 if shared else bank_size * torch.arange(batch).view(-1, 1, 1)
    touched = (indices + offset).unique().numel()
    key, row, entries = key_dim * SIZE, dim * SIZE, keys.numel() // key_dim
    merged = 2 * read * key_dim
    scores = 2 * batch * num_tape_tokens * bank_size * key_dim
    kind = f"B={batch}, {'learnable' if shared else 'input-driven'}, M={bank_size}"
    shape = f"{kind}, K={key_dim}, k={topk}, T={num_tape_tokens}"
    yield RooflineLine(
        "tape_select", shape, CountedWork(entries * key + 8 * read, scores + merged), select
    )
    needed = CountedWork((touched + entries) * key + 8 * read, 4 * merged)
    yield RooflineLine("tape_select_bwd", shape, needed, select_bwd)
    shape = f"{kind}, D={dim}, k={topk}, T={num_tape_tokens}"
    written = num_tape_tokens * batch * row
    yield RooflineLine(
        "tape_gather", shape, CountedWork(touched * row + written + 8 * read), gather, limited=True
    )
    needed = CountedWork((touched + entries) * row + written + 12 * read)
    yield RooflineLine("tape_gather_bwd", shape, needed, gather_bwd, limited=True)


def feed_forwards(
    inputs: int, tapes: int, dim: int, hidden: int, tape_hidden: int, products: str
) -> Iterator[RooflineLine]:
    """Count both feed-forwards, their weights included."""

    def parameters(wide: int, narrow: int) -> list[Tensor]:
        shapes = ((wide, dim), (wide,), (dim, narrow), (dim,))
        return [torch.randn(shape).to(HALF) for shape in shapes]

    x = torch.randn(inputs + tapes, dim).to(HALF)
    every = (*parameters(hidden, hidden), *parameters(2 * tape_hidden, tape_hidden))
    with ffn_products(products):
        forward, (y, *saved) = measured("dual_ffn", x, inputs, tapes, None, "gelu_tanh", *every)
        backward, _ = measured("dual_ffn_bwd", y, x, *saved, inputs, None, "gelu_tanh", *every)
    weights = sum(p.numel() for p in every) * SIZE
    kept = (inputs * hidden + tapes * 2 * tape_hidden) * SIZE
    token = x.numel() * SIZE
    flops = 2 * dim * (inputs * 2 * hidden + tapes * 3 * tape_hidden)
    shape = f"{inputs} + {tapes} rows, {dim} × {hidden}, {tape_hidden}, {products}"
    yield RooflineLine("dual_ffn", shape, CountedWork(2 * token + kept + weights, flops), forward)
    needed = CountedWork(3 * token + kept + 2 * weights, 2 * flops)
    yield RooflineLine("dual_ffn_bwd", shape, needed, backward)


def norms(rows: int, dim: int) -> Iterator[RooflineLine]:
    """Count the residual sum with its LayerNorm."""
    x, branch = torch.randn(2, rows, dim).to(HALF).unbind(0)
    weight = torch.ones(dim, dtype=HALF)
    forward, (total, normed, *saved) = measured("add_layer_norm", x, branch, weight, weight, 1e-6)
    backward, _ = measured("add_layer_norm_bwd", total, normed, total, weight, *saved)
    token, shape = rows * dim * SIZE, f"{rows} rows, D={dim}"
    yield RooflineLine("add_layer_norm", shape, CountedWork(4 * token), forward)
    yield RooflineLine("add_layer_norm_bwd", shape, CountedWork(4 * token), backward)


def lines(quick: bool) -> Iterator[RooflineLine]:
    """Yield every op at the sizes of the models; `quick` takes a minute's worth of them."""
    yield from attention(range(50, 257, 69 if quick else 12), repeats=256, heads=6, head_dim=64)
    if quick:
        yield from reading(2, 300, 384, 64, 5, 4, shared=False)
        return
    for rows in (50, 64, 128, 207, 256, 577):
        yield from attention([rows], repeats=256, heads=6, head_dim=64)
    yield from reading(4, 784, 384, 64, 5, 10, shared=False)
    yield from reading(4, 196, 768, 768, 5, 10, shared=False)
    yield from reading(32, 10_000, 384, 64, 5, 10, shared=True)
    for products in ("grouped", "cublas"):
        yield from feed_forwards(8 * 197, 8 * 10, 384, 1536, 768, products)
    yield from norms(2048, 384)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; return 1 if a ratio passes its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    options = parser.parse_args(argv)
    if not triton_runtime.INTERPRETED:
        given = sys.argv[1:] if argv is None else argv
        return start_again(MODULE, given, interpreted=True)
    torch.manual_seed(0)
    print(
        f"{'op':22}{'shape':46}{'GFLOP':>9}{'MB':>9}{'H200 µs':>9}  {'bound by':9}{'memory':>8}"
        f"{'L2':>8}{'products':>9}{'ratio':>8}"
    )
    over = 0
    for line in lines(options.quick):
        print(line.text(), flush=True)
        over += line.limited and line.ratio > LIMIT
    print(f"{over} over the limit of {LIMIT}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
