"""Fills the tables of docs/gpu-performance.md: what GPUs need for each op and model, and needed.

    python -m adatape_kernels.benchmarks.reports.gpu_performance docs/gpu-performance.md

The ops' work comes from benchmarks/audit/roofline.csv, where the Triton kernels were counted; the
cards' rates from benchmarks/audit/cards.py; what was measured from benchmarks/results.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adatape_kernels.benchmarks.audit.cards import CARDS, H200, Card
from adatape_kernels.benchmarks.audit.occupancy import CHIPS
from adatape_kernels.benchmarks.audit.work_counter import CountedWork
from adatape_kernels.benchmarks.harness import records
from adatape_kernels.ops.device_facts import DeviceFacts
from adatape_kernels.ops.dual_ffn import triton_epilogue
from adatape_kernels.ops.dual_ffn.triton_epilogue import SavedBytes

COUNTED = Path(__file__).parents[1] / "audit/roofline.csv"
RESULTS = Path(__file__).parents[1] / "results"
_MARKED = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)
SIZE = 2
"""Bytes of a number in bfloat16."""


@dataclass(frozen=True)
class CountedOp:
    """A line of roofline.csv: what the algorithm needs, and what our Triton kernels do."""

    op: str
    shape: str
    needed: CountedWork
    ours: CountedWork


def counted_ops(path: Path) -> dict[tuple[str, str], CountedOp]:
    """Return the lines of roofline.csv by op and shape."""
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            needed = CountedWork(float(row["needed_bytes"]), float(row["needed_flops"]))
            ours = CountedWork(
                *(float(row[name]) for name in ("bytes", "flops", "accessed_bytes", "launches"))
            )
            found[row["op"], row["shape"]] = CountedOp(row["op"], row["shape"], needed, ours)
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.2g}"


def op_table(ops: Iterable[CountedOp]) -> str:
    """Return floor and prediction of each op on each card."""
    rows = []
    for op in ops:
        cells = [
            f"{_microseconds(card.floor(op.needed))} / {_microseconds(card.predicted(op.ours))}"
            for card in CARDS
        ]
        rows.append([op.op, op.shape, *cells])
    return _table(["op", "shape", *(card.name for card in CARDS)], rows)


@dataclass(frozen=True)
class Stage:
    """A part of a model's forward pass: how often it runs, what it needs, and what ours does."""

    name: str
    times: int
    needed: CountedWork
    ours: CountedWork


def plain(launches: int, moved: float, flops: float = 0) -> tuple[CountedWork, CountedWork]:
    """Return the work of torch's own kernels, which are taken to do what is needed and no more.

    Args:
        launches: number of kernels.
        moved: bytes that are read and written.
        flops: those of products.
    """
    return CountedWork(moved, flops), CountedWork(moved, flops, 0, launches)


def product(rows: float, inner: int, outer: int) -> tuple[CountedWork, CountedWork]:
    """Return the work of a product of (rows, inner) and (inner, outer) in bfloat16."""
    moved = SIZE * (rows * (inner + outer) + inner * outer)
    return plain(1, moved, 2 * rows * inner * outer)


def pixels_of_patches(patches: float, size: int) -> tuple[CountedWork, CountedWork]:
    """Return the work of laying each patch's pixels side by side, which a product alone needs."""
    _, copied = plain(1, 2 * SIZE * patches * 3 * size**2)
    return CountedWork(), copied


@dataclass(frozen=True)
class CountedModel:
    """A ViT of 12 layers on 256 images of 224 pixels whose tape is read to its end."""

    name: str
    measured: str
    """The shape of its rows in benchmarks/results."""
    dim: int
    patch: int
    bank: int
    """Tokens of its bank, which is made of the image where bank_patch is not 0."""
    bank_patch: int
    num_tape_tokens: int
    attention: str
    feed_forward: str
    norm: str
    select: str
    gather: str
    reads: int
    """The batch's examples and steps over those of the read that was counted."""
    second_weights: tuple[tuple[int, int], ...]
    """Shapes of the second weights of `dual_ffn`."""

    def form(self, card: Card) -> str:
        """Return the form of `dual_ffn` that serves a forward pass in bfloat16 on a card."""
        chip = CHIPS[card.arch]
        capability = divmod(card.arch, 10)
        facts = DeviceFacts(card.name, chip.shared_per_block, chip.multiprocessors, capability)
        shapes = tuple(torch.Size(shape) for shape in self.second_weights)
        pays = triton_epilogue.pays_on(facts, torch.bfloat16, shapes, SavedBytes.FORWARD)
        return "epilogue" if pays else "cublas"

    def stages(self, ops: dict[tuple[str, str], CountedOp], form: str) -> list[Stage]:
        """Return the stages of its forward pass, in their order, with `dual_ffn` in a form."""
        batch, patches = 256, (224 // self.patch) ** 2
        tokens = batch * patches
        rows = batch * (patches + 1 + self.num_tape_tokens)

        def ours(name: str, op: str, shape: str, times: int = 1) -> Stage:
            line = ops[op, shape]
            return Stage(name, times, line.needed, line.ours)

        def read(name: str, op: str, shape: str) -> Stage:
            line = ops[op, shape]
            works = [CountedWork().plus(work, self.reads) for work in (line.needed, line.ours)]
            return Stage(name, 1, *works)

        found = [
            Stage("pixels of a patch side by side", 1, *pixels_of_patches(tokens, self.patch)),
            Stage("patches to tokens", 1, *product(tokens, 3 * self.patch**2, self.dim)),
            Stage("positions, class token", 1, *plain(2, 4 * SIZE * tokens * self.dim)),
        ]
        if self.bank_patch:
            entries = batch * self.bank
            side, pixels = self.bank_patch, 3 * self.bank_patch**2
            found += [
                Stage("pixels of a bank's patch", 1, *pixels_of_patches(entries, side)),
                Stage("patches to bank", 1, *product(entries, pixels, self.dim)),
                Stage("the bank's positions", 1, *plain(1, 2 * SIZE * entries * self.dim)),
                Stage("the bank's product", 1, *product(entries, self.dim, self.dim)),
                Stage("the bank's norm", 1, *plain(1, 2 * SIZE * entries * self.dim)),
            ]
        found += [
            read("select", "tape_select", self.select),
            read("gather", "tape_gather", self.gather),
            Stage("appending the tape", 1, *plain(1, 2 * SIZE * rows * self.dim)),
            Stage("queries, keys, values", 12, *product(rows, self.dim, 3 * self.dim)),
            ours("attention", "elastic_attention", self.attention, 12),
            Stage("attention's product", 12, *product(rows, self.dim, self.dim)),
            ours("sum and norm", "add_layer_norm", self.norm, 24),
            ours("feed-forwards", "dual_ffn", f"{self.feed_forward}, {form}", 12),
            Stage("head", 1, *product(batch, self.dim, 1000)),
        ]
        return found


MODELS = (
    CountedModel(
        "S/16, input-driven bank, T=10",
        "V=S/16 B=256 T=10 k=5 bank=input M=10000 tau=2 tape=tau",
        *(384, 16, 784, 8, 10),
        "B=256, 207 rows, 6 heads of 64",
        "50432 + 2560 rows, 384 × 1536, 384",
        "52992 rows, D=384",
        "B=256, input-driven, M=784, K=384, k=5, T=10",
        "B=256, input-driven, M=784, D=384, k=5, T=10",
        1,
        ((384, 1536), (384, 384)),
    ),
    CountedModel(
        "B/32, learnable bank, T=64",
        "V=B/32 B=256 T=64 k=2 bank=learn M=10000 tau=8 tape=tau",
        *(768, 32, 10_000, 0, 64),
        "B=256, 114 rows, 12 heads of 64",
        "12800 + 16384 rows, 768 × 3072, 768",
        "29184 rows, D=768",
        "B=32, learnable, M=10000, K=768, k=2, T=4",
        "B=32, learnable, M=10000, D=768, k=2, T=4",
        8 * 16,
        ((768, 3072), (768, 768)),
    ),
)


def model_table(model: CountedModel, ops: dict[tuple[str, str], CountedOp]) -> str:
    """Return a model's forward pass, stage by stage, and its sum."""
    columns = []
    for card in CARDS:
        form = model.form(card)
        stages = model.stages(ops, form)
        cells = [
            f"{_microseconds(stage.times * card.floor(stage.needed))} / "
            f"{_microseconds(stage.times * card.predicted(stage.ours))}"
            + (f" ({form})" if stage.name == "feed-forwards" else "")
            for stage in stages
        ]
        floor = sum(stage.times * card.floor(stage.needed) for stage in stages)
        predicted = sum(stage.times * card.predicted(stage.ours) for stage in stages)
        columns.append([*cells, f"**{floor * 1e3:.2f} / {predicted * 1e3:.2f} ms**"])
    *rows, sums = map(list, zip(*columns, strict=True))
    rows = [
        [stage.name, str(stage.times), *cells] for stage, cells in zip(stages, rows, strict=True)
    ]
    rows.append(["**sum**", "", *sums])
    header = ["stage", "times", *(card.name for card in CARDS)]
    return f"{model.name}\n\n{_table(header, rows)}"


FORM_OF_RESULTS = "cublas"
"""The form of `dual_ffn` in the rows of benchmarks/results, which are older than "epilogue"."""

MEASURED: tuple[tuple[str, str, str, tuple[str, str]], ...] = (
    (
        "elastic_attention",
        "forward",
        "B=256 N=197 T=10 tape=uniform H=6 d=64",
        ("elastic_attention", "B=256, 207 rows, 6 heads of 64"),
    ),
    (
        "tape_select",
        "forward",
        "B=256 M=784 bank=input K=64 k=5 T=10 tau=10",
        ("tape_select", "B=256, input-driven, M=784, K=64, k=5, T=10"),
    ),
    (
        "dual_ffn",
        "forward",
        "B=256 N=197 T=10 tape=uniform D=384 F=1536 G=384",
        ("dual_ffn", f"50432 + 2560 rows, 384 × 1536, 384, {FORM_OF_RESULTS}"),
    ),
)
"""Rows of the H200 in bfloat16, and the counted line that each compares with.

Tapes of these rows have half their length on average, so that up to 3 % fewer rows are computed.
"""


def measured_table(rows: Iterable[records.ResultRow], ops: dict[tuple[str, str], CountedOp]) -> str:
    """Return what an H200 took as a CUDA graph beside floor and prediction."""
    taken = {
        (row.op, row.direction, row.shape, row.provider): row.median_s
        for row in rows
        if row.dtype == "bfloat16" and row.median_s
    }
    lines = []

    def add(what: str, floor: float, predicted: float, seconds: float | None) -> None:
        if seconds is not None:
            cells = (floor * 1e3, predicted * 1e3, seconds * 1e3)
            lines.append([what, *(f"{cell:.3g}" for cell in cells), f"{seconds / predicted:.1f}"])

    for op, direction, shape, counted in MEASURED:
        line = ops[counted]
        triton = f"Triton, {FORM_OF_RESULTS}" if op == "dual_ffn" else "Triton"
        for provider, name in (("ours [graph]", triton), ("ours cuda [graph]", "C++")):
            seconds = taken.get((op, direction, shape, provider))
            what = f"{op}, {name}, {shape}"
            add(what, H200.floor(line.needed), H200.predicted(line.ours), seconds)
    for model in MODELS:
        stages = model.stages(ops, FORM_OF_RESULTS)
        seconds = taken.get(("model", "forward", model.measured, "ours, capacity [graph]"))
        floor = sum(stage.times * H200.floor(stage.needed) for stage in stages)
        predicted = sum(stage.times * H200.predicted(stage.ours) for stage in stages)
        add(f"model, feed-forwards by {FORM_OF_RESULTS}, {model.name}", floor, predicted, seconds)
    header = ["case", "floor, ms", "predicted, ms", "measured, ms", "measured / predicted"]
    return _table(header, lines)


def fill(text: str, counted: Path, results: Path) -> str:
    """Return the page with its tables made anew.

    Raises:
        ValueError: the page asks for another table than `ops`, `models` and `measured`.
    """
    ops = counted_ops(counted)
    made = {
        "ops": lambda: op_table(ops.values()),
        "models": lambda: "\n\n".join(model_table(model, ops) for model in MODELS),
        "measured": lambda: measured_table(records.read(results / "nvidia-h200.csv"), ops),
    }

    def table(match: re.Match) -> str:
        if match[2] not in made:
            raise ValueError(f"gpu: expected one of {', '.join(made)}, got {match[2]!r}")
        return f"{match[1]}{made[match[2]]()}\n{match[3]}"

    return _MARKED.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the page; return 2 if a file cannot be read or written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("page", type=Path, help="Markdown with marked tables")
    parser.add_argument("--counted", type=Path, default=COUNTED, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        old = options.page.read_text(encoding="utf-8")
        new = fill(old, options.counted, options.results)
        if new != old:
            options.page.write_text(new, encoding="utf-8")
            print(options.page)
    except (ValueError, KeyError, OSError) as error:
        print(f"gpu_performance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
