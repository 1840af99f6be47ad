"""Tells what each op must move and compute, and what our Triton kernels do.

    python -m adatape_kernels.benchmarks.audit.roofline --quick
    python -m adatape_kernels.benchmarks.audit.roofline --out benchmarks/audit/roofline.csv

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
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adatape_kernels.benchmarks.audit.again import start_again
from adatape_kernels.benchmarks.audit.cards import H200
from adatape_kernels.benchmarks.audit.work_counter import CountedWork, counting
from adatape_kernels.ops import ffn_products, triton_runtime
from adatape_kernels.ops.op import operation

MODULE = "adatape_kernels.benchmarks.audit.roofline"
LIMIT = 1.3
"""The most that `ratio` may be for gathering, for a read's gradient, and for attention at 50 to 256
rows."""


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
        return H200.floor(self.ours) / H200.floor(self.needed)

    def text(self) -> str:
        needed, ours = self.needed, self.ours
        seconds = H200.floor(needed)
        bound = "memory" if needed.bytes / H200.memory >= seconds else "products"
        products = f"{ours.flops / needed.flops:9.2f}" if needed.flops and ours.flops else f"{'':9}"
        over = "  OVER" if self.limited and self.ratio > LIMIT else ""
        return (
            f"{self.op:22}{self.shape:46}{needed.flops / 1e9:9.2f}{needed.bytes / 1e6:9.1f}"
            f"{seconds * 1e6:9.1f}  {bound:9}{ours.bytes / needed.bytes:8.2f}"
            f"{ours.accessed / needed.bytes:8.2f}{products}{self.ratio:8.2f}{over}"
        )

    def cells(self) -> dict[str, object]:
        """Return a row of the CSV file: FLOPs, bytes and launches, needed and ours."""
        needed, ours = self.needed, self.ours
        numbers = (needed.flops, needed.bytes, ours.flops, ours.bytes, ours.accessed, ours.launches)
        return dict(zip(COLUMNS, (self.op, self.shape, *map(round, numbers)), strict=True))


COLUMNS = (
    *("op", "shape", "needed_flops", "needed_bytes"),
    *("flops", "bytes", "accessed_bytes", "launches"),
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
    repeats: int = 1,
) -> Iterator[RooflineLine]:
    """Select, gather, and do both in one op, forward and backward; no example halts early.

    The work of `batch` examples with banks of their own stands for `repeats` times as many.
    """
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
    read_bwd, _ = measured(
        *("tape_read_bwd", query, bank, tape, weights, ponder, weights, indices, counts),
        *(True, "entropy"),
    )
    read_both = select.plus(gather)
    read_both.launches = select.launches + gather.launches

    # Each entry that is read has an index and a weight of 4 bytes.
    total = batch * repeats
    read = num_tape_tokens * topk * total
    offset = 0 if shared else bank_size * torch.arange(batch).view(-1, 1, 1)
    touched = (indices + offset).unique().numel()
    touched *= repeats
    entries = bank_size if shared else bank_size * total
    key, row = key_dim * SIZE, dim * SIZE
    merged = 2 * read * key_dim
    scores = 2 * total * num_tape_tokens * bank_size * key_dim
    kind = f"B={total}, {'learnable' if shared else 'input-driven'}, M={bank_size}"
    selected = CountedWork(entries * key + 8 * read, scores + merged)
    selected_bwd = CountedWork((touched + entries) * key + 8 * read, 4 * merged)
    written = num_tape_tokens * total * row
    gathered = CountedWork(touched * row + written + 8 * read)
    gathered_bwd = CountedWork((touched + entries) * row + written + 12 * read)
    # A read has the keys at hand, and needs the other features of the rows that it merges. Its
    # gradient is one bank, in which the keys' gradient is part of the rows'.
    other = touched * (row - key)
    read_whole = CountedWork(entries * key + other + written + 8 * read, scores + merged)
    read_whole_bwd = CountedWork((touched + entries) * row + written + 12 * read, 4 * merged)
    read_shape, gather_shape = f"{kind}, K={key_dim}", f"{kind}, D={dim}"
    whole_shape = f"{kind}, D={dim}, K={key_dim}"
    for name, sizes, needed, ours in (
        ("tape_select", read_shape, selected, select),
        ("tape_select_bwd", read_shape, selected_bwd, select_bwd),
        ("tape_gather", gather_shape, gathered, gather),
        ("tape_gather_bwd", gather_shape, gathered_bwd, gather_bwd),
        ("tape_read", whole_shape, read_whole, read_both),
        ("tape_read_bwd", whole_shape, read_whole_bwd, read_bwd),
    ):
        shape = f"{sizes}, k={topk}, T={num_tape_tokens}"
        whole = CountedWork().plus(ours, repeats)
        limited = "gather" in name or name == "tape_read_bwd"
        yield RooflineLine(name, shape, needed, whole, limited)


def feed_forwards(
    inputs: int,
    tapes: int,
    dim: int,
    hidden: int,
    tape_hidden: int,
    products: str,
    repeats: int = 1,
) -> Iterator[RooflineLine]:
    """Count both feed-forwards, their weights included.

    Our work on these rows stands for `repeats` times as many, as if weights were read each time.
    """

    def parameters(wide: int, narrow: int) -> list[Tensor]:
        shapes = ((wide, dim), (wide,), (dim, narrow), (dim,))
        return [torch.randn(shape).to(HALF) for shape in shapes]

    x = torch.randn(inputs + tapes, dim).to(HALF)
    every = (*parameters(hidden, hidden), *parameters(2 * tape_hidden, tape_hidden))
    with ffn_products(products):
        forward, (y, *saved) = measured("dual_ffn", x, inputs, tapes, None, "gelu_tanh", *every)
        backward, _ = measured("dual_ffn_bwd", y, x, *saved, inputs, None, "gelu_tanh", *every)
    weights = sum(p.numel() for p in every) * SIZE
    token = x.numel() * SIZE * repeats
    inputs, tapes = inputs * repeats, tapes * repeats
    kept = (inputs * hidden + tapes * 2 * tape_hidden) * SIZE
    flops = 2 * dim * (inputs * 2 * hidden + tapes * 3 * tape_hidden)
    shape = f"{inputs} + {tapes} rows, {dim} × {hidden}, {tape_hidden}, {products}"
    ours = [CountedWork().plus(work, repeats) for work in (forward, backward)]
    yield RooflineLine("dual_ffn", shape, CountedWork(2 * token + kept + weights, flops), ours[0])
    needed = CountedWork(3 * token + kept + 2 * weights, 2 * flops)
    yield RooflineLine("dual_ffn_bwd", shape, needed, ours[1])


def norms(rows: int, dim: int, parts: int) -> Iterator[RooflineLine]:
    """Count the residual sum with its LayerNorm.

    What one and two of so many equal parts of the rows take tells what each further part takes;
    the sums over all rows that the gradient ends with are as large for any number of them.
    """

    def works(rows: int) -> tuple[CountedWork, CountedWork]:
        x, branch = torch.randn(2, rows, dim).to(HALF).unbind(0)
        weight = torch.ones(dim, dtype=HALF)
        forward, results = measured("add_layer_norm", x, branch, weight, weight, 1e-6)
        total, normed, *saved = results
        given = total.clone(), normed
        backward, _ = measured("add_layer_norm_bwd", *given, total, weight, *saved)
        return forward, backward

    token, shape = rows * dim * SIZE, f"{rows} rows, D={dim}"
    one, two = works(rows // parts), works(2 * rows // parts)
    for name, first, both in zip(("add_layer_norm", "add_layer_norm_bwd"), one, two, strict=True):
        ours = first.plus(both.plus(first, -1), parts - 1)
        yield RooflineLine(name, shape, CountedWork(4 * token), ours)


def leaving(examples: int, dim: int, kept: float) -> Iterator[RooflineLine]:
    """Count rows that leave and come home, from a batch of examples of 197 rows."""
    rows = examples * 197
    data, keep = torch.randn(rows, dim).to(HALF), torch.rand(rows) < kept
    cu_inputs = torch.arange(examples + 1, dtype=torch.int32) * 197
    cu_tapes = torch.full_like(cu_inputs, rows)
    capacity = int(keep.sum())
    forward, results = measured("compact_rows", data, keep, cu_inputs, cu_tapes, capacity)
    packed, source = results[0], results[3]
    backward, _ = measured("compact_rows_bwd", packed, source, rows)
    whole, part = rows * dim * SIZE, capacity * dim * SIZE
    shape = f"{capacity} of {rows} rows, D={dim}"
    needed = CountedWork(2 * part + rows + 4 * capacity)
    yield RooflineLine("compact_rows", shape, needed, forward)
    yield RooflineLine("compact_rows_bwd", shape, CountedWork(whole + part), backward)
    weights = torch.rand(capacity)
    forward, _ = measured("accumulate_rows", data, packed, source, weights, None)
    backward, _ = measured("accumulate_rows_bwd", data, None, packed, source, weights, None)
    yield RooflineLine("accumulate_rows", shape, CountedWork(2 * whole + part), forward)
    yield RooflineLine("accumulate_rows_bwd", shape, CountedWork(3 * part), backward)


def lines(quick: bool) -> Iterator[RooflineLine]:
    """Yield every op at the sizes of the models; `quick` takes a minute's worth of them."""
    yield from attention(range(50, 257, 69 if quick else 12), repeats=256, heads=6, head_dim=64)
    if quick:
        yield from reading(2, 300, 384, 64, 5, 4, shared=False)
        return
    for rows in (50, 64, 128, 207, 256, 577):
        yield from attention([rows], repeats=256, heads=6, head_dim=64)
    for rows in (57, 114):
        yield from attention([rows], repeats=256, heads=12, head_dim=64)
    yield from reading(4, 784, 384, 64, 5, 10, shared=False, repeats=64)
    yield from reading(4, 784, 384, 384, 5, 10, shared=False, repeats=64)
    yield from reading(4, 196, 768, 768, 5, 10, shared=False, repeats=64)
    yield from reading(32, 10_000, 384, 64, 5, 10, shared=True)
    yield from reading(32, 10_000, 768, 768, 2, 4, shared=True)
    for products in ("grouped", "cublas"):
        yield from feed_forwards(8 * 197, 8 * 10, 384, 1536, 768, products)
    for products in ("cublas", "epilogue"):
        yield from feed_forwards(16 * 197, 16 * 10, 384, 1536, 384, products, repeats=16)
        yield from feed_forwards(16 * 50, 16 * 64, 768, 3072, 768, products, repeats=16)
    yield from norms(256 * 207, 384, parts=16)
    yield from norms(256 * 114, 768, parts=16)
    for kept in (0.25, 0.75):
        yield from leaving(32, 768, kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; return 1 if a ratio passes its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--out", type=Path, help="CSV file to write; default: none")
    options = parser.parse_args(argv)
    if not triton_runtime.INTERPRETED:
        given = sys.argv[1:] if argv is None else argv
        return start_again(MODULE, given, interpreted=True)
    torch.manual_seed(0)
    print(
        f"{'op':22}{'shape':46}{'GFLOP':>9}{'MB':>9}{'H200 µs':>9}  {'bound by':9}{'memory':>8}"
        f"{'L2':>8}{'products':>9}{'ratio':>8}"
    )
    found = []
    for line in lines(options.quick):
        print(line.text(), flush=True)
        found.append(line)
    if options.out is not None:
        with options.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(line.cells() for line in found)
    over = sum(line.limited and line.ratio > LIMIT for line in found)
    print(f"{over} over the limit of {LIMIT}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
