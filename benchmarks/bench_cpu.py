"""The CPU kernels beside their peers, with the goals: python benchmarks/bench_cpu.py [--quick].

Every case times its providers in turn, in one process, on the same inputs, after ours was checked
against a peer. Ratios of medians are what counts; the table shows how far apart the goals are.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import records
import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import ElasticBatch, ops, use_backend
from adatape_kernels.models import AdaTapeViT, PaddedAdaTape, adatape_vit
from adatape_kernels.ops import FFN
from adatape_kernels.recipes import measure

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
DISPATCH_LIMIT = 20e-6


@dataclass(frozen=True)
class Outcome:
    """A ratio that a goal speaks of: how many times faster ours is than the peer."""

    case: str
    ratio: float
    goal: float

    def line(self) -> str:
        verdict = "ok" if self.ratio >= self.goal else "MISSED"
        return f"{self.case:74} {self.ratio:7.2f} {self.goal:7.2f}  {verdict}"


class Bench:
    """Times cases, collects rows and outcomes."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.rows: list[records.Row] = []
        self.outcomes: list[Outcome] = []

    def case(
        self,
        op: str,
        direction: str,
        dtype: torch.dtype,
        shape: str,
        runs: Mapping[str, Callable[[], object]],
        goals: Mapping[str, float],
        flops: float | None = None,
        rounds: int | None = None,
        peaks: bool = False,
    ) -> None:
        """Time the runs, "ours" among them; `goals` is the ratio asked for over each peer."""
        timings = measure.seconds(runs, rounds or self.rounds, warmup=1)
        name = str(dtype).removeprefix("torch.")
        for provider, timing in timings.items():
            peak = measure.peak_bytes(runs[provider]) if peaks else None
            self.rows.append(
                records.row(
                    op, direction, provider, name, shape, timing, flops=flops, peak_bytes=peak
                )
            )
        case = f"{op} {direction} {name} {shape}"
        for peer, goal in goals.items():
            self.outcome(f"{case} / {peer}", timings[peer].median / timings["ours"].median, goal)
            if peaks:
                ours, theirs = (measure.peak_bytes(runs[p]) for p in ("ours", peer))
                self.outcome(f"{case} peak memory / {peer}", theirs / ours, 1.0)

    def outcome(self, case: str, ratio: float, goal: float) -> None:
        self.outcomes.append(Outcome(case, ratio, goal))
        print(self.outcomes[-1].line(), flush=True)


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with use_backend(name):
            return run()

    return forced


def bench_reading(bench: Bench) -> None:
    """tape_select + tape_gather, forward and backward, against the eager reference."""
    for shape, sliced in itertools.product(((64, 784, 384), (10_000, 384)), (False, True)):
        reading_case(bench, shape, sliced)


def reading_case(bench: Bench, shape: tuple[int, ...], sliced: bool) -> None:
    """Keys are a tensor of their own, or a slice of the bank: then ours is tape_read."""
    batch, dim, key_dim = 64, shape[-1], 64
    bank = F.layer_norm(torch.randn(shape), (dim,)).requires_grad_()
    query = F.layer_norm(torch.randn(batch, key_dim), (key_dim,)).requires_grad_()
    own_keys = bank.detach()[..., :key_dim].clone().requires_grad_()
    leaves = (query, bank) if sliced else (query, bank, own_keys)
    options: dict[str, Any] = {"num_tape_tokens": 10, "topk": 5, "halt_threshold": 10.0}

    def two_ops() -> list[Tensor]:
        keys = bank[..., :key_dim] if sliced else own_keys
        selection = ops.tape_select(query, keys, **options)
        tape, _ = ops.tape_gather(bank, selection.indices, selection.weights, selection.counts)
        return results(tape, selection.ponder)

    def one_op() -> list[Tensor]:
        tape, _, selection = ops.tape_read(query, bank, **options)
        return results(tape, selection.ponder)

    def results(tape: Tensor, ponder: Tensor) -> list[Tensor]:
        loss = tape.square().sum() + ponder.sum()
        return [tape, *torch.autograd.grad(loss, leaves)]

    runs = {"ours": one_op if sliced else two_ops, "eager": with_backend("eager", two_ops)}
    check(runs["ours"](), runs["eager"]())
    kind = "input-driven" if bank.dim() == 3 else "learned"
    keys = "keys sliced" if sliced else "keys apart"
    bench.case(
        "select+gather",
        "forward+backward",
        torch.float32,
        f"B=64 M={shape[-2]} {kind} {keys}",
        runs,
        {"eager": 5.0},
    )


def bench_attention(bench: Bench) -> None:
    """elastic_attention against padded SDPA with a mask and SDPA sequence by sequence."""
    cases = itertools.product(
        (6, 12),
        (torch.float32, torch.bfloat16),
        ((50, 256, 1.5), (197, 207, 0.95)),
        (False, True),
    )
    for heads, dtype, (low, high, goal), backward in cases:
        attention_case(bench, heads, dtype, low, high, goal, backward)


def attention_case(
    bench: Bench,
    heads: int,
    dtype: torch.dtype,
    low: int,
    high: int,
    goal: float,
    backward: bool,
) -> None:
    lens = torch.randint(low, high + 1, (16,))
    layout = ElasticBatch.from_packed(
        torch.zeros(int(lens.sum()), 1),
        F.pad(lens.cumsum(0), (1, 0)).int(),
        tape_lens=torch.randint(0, 11, (16,)),
    )
    rows = len(layout.data)
    mask = torch.arange(int(lens.max())) < lens.unsqueeze(1)
    qkv = torch.randn(rows, 3, heads, 64, dtype=dtype)
    dout = torch.randn(rows, heads, 64, dtype=dtype)
    padded = to_padded(layout, qkv, mask)
    padded_dout = to_padded(layout, dout.unsqueeze(1), mask)[:, :, 0].transpose(1, 2)
    sequences = [
        part[:n].permute(1, 2, 0, 3).unsqueeze(1).contiguous().requires_grad_(backward)
        for part, n in zip(padded.unbind(0), lens.tolist(), strict=True)
    ]
    qkv.requires_grad_(backward)
    padded.requires_grad_(backward)

    def ours() -> Tensor:
        out = ops.elastic_attention(*qkv.unbind(1), layout.cu_inputs, layout.cu_tapes)
        return torch.autograd.grad(out, qkv, dout)[0] if backward else out.unsqueeze(1)

    def padded_sdpa() -> Tensor:
        q, k, v = padded.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        if backward:
            return torch.autograd.grad(out, padded, padded_dout)[0]
        return out.transpose(1, 2).unsqueeze(2)

    def sdpa_each() -> object:
        outs = [F.scaled_dot_product_attention(*x) for x in sequences]
        if not backward:
            return outs
        return torch.autograd.grad(outs, sequences, [x[0].detach() for x in sequences])

    found, expected = to_padded(layout, ours(), mask)[mask].float(), padded_sdpa()[mask].float()
    check([found], [expected], 1e-4 if dtype == torch.float32 else 0.03)
    bench.case(
        "elastic_attention",
        "forward+backward" if backward else "forward",
        dtype,
        f"B=16 H={heads} d=64 L={low}-{high}",
        {"ours": ours, "padded SDPA": padded_sdpa, "SDPA each": sdpa_each},
        {"padded SDPA": goal, "SDPA each": 1.0},
        flops=4 * 64 * heads * int(lens.square().sum()) * (3.5 if backward else 1),
    )


def to_padded(layout: ElasticBatch, rows: Tensor, mask: Tensor) -> Tensor:
    """Return rows (rows, ...) of the layout as (batch, longest, ...)."""
    packed, _ = layout.with_data(rows.flatten(1)).to_packed()
    padded = packed.new_zeros(*mask.shape, packed.shape[1])
    return padded.index_put((mask,), packed).unflatten(2, rows.shape[1:])


def bench_dual_ffn(bench: Bench) -> None:
    """dual_ffn against linear, activation, linear on the two slices."""
    for dtype in (torch.float32, torch.bfloat16):
        dual_ffn_case(bench, dtype)


def dual_ffn_case(bench: Bench, dtype: torch.dtype) -> None:
    inputs, rows, dim = 16 * 197, 16 * 203, 384
    x = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, dim, dtype=dtype)

    def parameters(hidden: int, gates: int) -> FFN:
        shapes = ((gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,))
        return FFN(*((torch.randn(s, dtype=dtype) / 20).requires_grad_() for s in shapes))

    one, two = parameters(1536, gates=1), parameters(384, gates=2)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.dual_ffn(x, inputs, one, two), (x, *one, *two), dy)

    def sliced() -> tuple[Tensor, ...]:
        act = F.gelu(F.linear(x[:inputs], one.w1, one.b1), approximate="tanh")
        tape = F.glu(F.linear(x[inputs:], two.w1, two.b1))
        y = torch.cat([F.linear(act, one.w2, one.b2), F.linear(tape, two.w2, two.b2)])
        return torch.autograd.grad(y, (x, *one, *two), dy)

    check(ours(), sliced(), 1e-3 if dtype == torch.float32 else 0.03)
    runs = {"ours": ours, "sliced": sliced}
    shape = "197:6 rows B=16 D=384"
    bench.case("dual_ffn", "forward+backward", dtype, shape, runs, {"sliced": 1.0})


def bench_model(bench: Bench, rounds: int) -> None:
    """Whole models against their padded counterparts; the goal follows from the rows saved."""
    s16 = adatape_vit("S/16", num_tape_tokens=10, topk=5, halt_threshold=2.0)
    b32 = adatape_vit(
        "B/32", num_tape_tokens=64, topk=2, halt_threshold=8.0, bank="learn", bank_size=10_000
    )
    for name, model in (("S/16", s16), ("B/32", b32)):
        for direction in ("forward", "training step"):
            model_case(bench, name, model, direction, rounds)


def model_case(bench: Bench, name: str, model: AdaTapeViT, direction: str, rounds: int) -> None:
    images, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
    inputs, steps = model.config.num_patches + 1, model.config.num_tape_tokens
    with torch.no_grad():
        tape = model(images).tape_lens.float().mean().item()

    def step(which: AdaTapeViT | PaddedAdaTape) -> None:
        if direction == "forward":
            with torch.no_grad():
                which(images)
        else:
            model.loss(which(images), labels).backward()
            model.zero_grad()

    padded = model.padded()
    shape = f"{name} T={steps} B=8 tape {tape:.1f}"
    bench.case(
        "model",
        direction,
        torch.float32,
        shape,
        {"ours": lambda: step(model), "padded": lambda: step(padded)},
        {"padded": 0.95 * (inputs + steps) / (inputs + tape)},
        rounds=rounds,
        peaks=direction == "training step",
    )


def bench_dispatch(bench: Bench) -> None:
    """Each op on an input so small that only its overhead is left; goal 20 µs."""
    query, keys = torch.randn(1, 8), torch.randn(1, 4, 8)
    selection = ops.tape_select(query, keys, num_tape_tokens=1, topk=1, halt_threshold=1.0)
    x = ElasticBatch.from_padded(torch.randn(1, 2, 8))
    q = torch.randn(2, 1, 8)
    ffn = FFN(torch.randn(8, 8), torch.randn(8), torch.randn(8, 8), torch.randn(8))
    calls = {
        "tape_select": lambda: ops.tape_select(
            query, keys, num_tape_tokens=1, topk=1, halt_threshold=1.0
        ),
        "tape_gather": lambda: ops.tape_gather(
            keys, selection.indices, selection.weights, selection.counts
        ),
        "elastic_attention": lambda: ops.elastic_attention(q, q, q, x.cu_inputs, x.cu_tapes),
        "dual_ffn": lambda: ops.dual_ffn(x.data, 2, ffn),
    }
    for name, call in calls.items():

        def thousand(call=call):
            for _ in range(1000):
                call()

        timing = measure.seconds({name: thousand}, bench.rounds, warmup=1)[name]
        each = measure.Timing(*(s / 1000 for s in (timing.median, timing.p20, timing.p80)))
        bench.rows.append(records.row(name, "dispatch", "ours", "float32", "tiny", each))
        bench.outcome(
            f"{name} dispatch {each.median * 1e6:.1f} us, goal 20 us",
            DISPATCH_LIMIT / each.median,
            1.0,
        )


def check(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-3) -> None:
    """Stop when a result differs from the peer's: a wrong provider is not timed."""
    for a, b in zip(ours, theirs, strict=True):
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        if not error <= tolerance * size:
            sys.exit(f"wrong result: off by {error:.3g}, the largest magnitude is {size:.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, no whole models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(rounds=3 if arguments.quick else 11)
    print(f"{'case / peer':74} {'ratio':>7} {'goal':>7}")
    bench_dispatch(bench)
    bench_reading(bench)
    bench_attention(bench)
    bench_dual_ffn(bench)
    if not arguments.quick:
        bench_model(bench, rounds=5)
    records.write(arguments.out, bench.rows)
    missed = [outcome for outcome in bench.outcomes if outcome.ratio < outcome.goal]
    print(f"\n{len(bench.outcomes) - len(missed)} of {len(bench.outcomes)} goals met")
    print(f"rows: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
