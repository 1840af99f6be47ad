"""Runs every op and small models on ever other sizes, and prints how much memory stays resident.

    python -m adatape_kernels.benchmarks.memory_soak --minutes 20 --threads 1

Each call takes sizes and values of its own, in float32 or bfloat16, forward and backward, on the
CPU; the models take a step of an optimiser. The command fails if, once the warm-up is over, memory
grows by more than a tenth. With --exact batches keep the numbers of rows that they have instead of
having them rounded up, which shows what torch's bfloat16 products keep for each of an op's, and
that the spare rows of encoders keep that of models small.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from adatape_kernels import ElasticBatch, layers, models, ops
from adatape_kernels.ops import FFN

DTYPES = (torch.float32, torch.bfloat16)
ROW_MULTIPLE = 256
MOST_GROWTH = 1.1
DIM, HEADS, KEY_DIM, CLASSES = 64, 2, 32, 10


def resident_megabytes() -> float:
    """Return how much memory of this process is resident.

    Raises:
        OSError: the system has no /proc.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class SoakSizes:
    """Sizes and tensors at random."""

    def __init__(self, random: Random, exact: bool):
        self.random = random
        self.exact = exact

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def lens(self, most_examples: int, most_rows: int) -> list[int]:
        return [
            self.random.randint(1, most_rows) for _ in range(self.random.randint(1, most_examples))
        ]

    def bank(self, dtype: torch.dtype, batch: int, dim: int) -> Tensor:
        size = self.random.randint(40, 2000)
        shape = (batch, size, dim) if self.random.random() < 0.5 else (size, dim)
        return self.tensor(dtype, *shape)


def backward(*results: Tensor) -> None:
    """Compute the gradients of the sum of all results."""
    torch.stack([result.float().sum() for result in results]).sum().backward()


def tape_select(sizes: SoakSizes, dtype: torch.dtype) -> None:
    batch = sizes.random.randint(1, 12)
    query, keys = sizes.tensor(dtype, batch, KEY_DIM), sizes.bank(dtype, batch, KEY_DIM)
    read = ops.tape_select(query, keys, num_tape_tokens=8, topk=3, halt_threshold=2.0)
    backward(read.weights, read.ponder)


def tape_read(sizes: SoakSizes, dtype: torch.dtype) -> None:
    """Read, which selects and gathers."""
    batch = sizes.random.randint(1, 12)
    query, bank = sizes.tensor(dtype, batch, KEY_DIM), sizes.bank(dtype, batch, DIM)
    tape, _, read = ops.tape_read(query, bank, num_tape_tokens=8, topk=3, halt_threshold=2.0)
    backward(tape, read.ponder)


def elastic_attention(sizes: SoakSizes, dtype: torch.dtype) -> None:
    batch = ElasticBatch.from_packed(*packed(sizes, dtype, 8, 600))
    q, k, v = (sizes.tensor(dtype, len(batch.data), HEADS, DIM // HEADS) for _ in range(3))
    backward(ops.elastic_attention(q, k, v, batch.cu_inputs, batch.cu_tapes))


def packed(
    sizes: SoakSizes, dtype: torch.dtype, most_examples: int, most_rows: int
) -> tuple[Tensor, Tensor]:
    """Return rows of sequences of any lengths, and the bounds of the sequences."""
    bounds = torch.tensor([0, *sizes.lens(most_examples, most_rows)]).cumsum(0)
    return sizes.tensor(dtype, int(bounds[-1]), DIM), bounds


def dual_ffn(sizes: SoakSizes, dtype: torch.dtype) -> None:
    rows = sizes.random.randint(2, 3000)
    inputs = sizes.random.randint(1, rows)
    shapes = ((256, DIM), (256,), (DIM, 256), (DIM,)), ((128, DIM), (128,), (DIM, 64), (DIM,))
    both = (FFN(*(sizes.tensor(dtype, *shape) for shape in shapes[i])) for i in range(2))
    used = rows if sizes.exact else torch.tensor(rows)
    backward(ops.dual_ffn(sizes.tensor(dtype, rows, DIM), inputs, *both, num_rows=used))


def add_layer_norm(sizes: SoakSizes, dtype: torch.dtype) -> None:
    shape = sizes.random.randint(1, 4000), DIM
    x, branch = (sizes.tensor(dtype, *shape) for _ in range(2))
    backward(*ops.add_layer_norm(x, branch, sizes.tensor(dtype, DIM), sizes.tensor(dtype, DIM)))


class SoakTraining(NamedTuple):
    """A model with its optimiser, and what computes the model's loss on a batch of some size."""

    optimizer: torch.optim.Optimizer
    loss: Callable[[SoakSizes], Tensor]

    def step(self, sizes: SoakSizes) -> None:
        self.optimizer.zero_grad()
        self.loss(sizes).backward()
        self.optimizer.step()


def vit(dtype: torch.dtype, row_multiple: int) -> SoakTraining:
    """Return an AdaTape-ViT, whose batches differ in their images and in how much they read."""
    config = models.AdaTapeViTConfig(
        image_size=32,
        patch_size=8,
        num_classes=CLASSES,
        dim=DIM,
        depth=2,
        num_heads=HEADS,
        ffn_dim=128,
        num_tape_tokens=10,
        topk=3,
        halt_threshold=2.0,
    )
    model = models.AdaTapeViT(config).to(dtype)
    model.encoder.row_multiple = row_multiple

    def loss(sizes: SoakSizes) -> Tensor:
        batch = sizes.random.randint(1, 32)
        labels = torch.randint(CLASSES, (batch,))
        return model.loss(model(torch.randn(batch, 3, 32, 32).to(dtype)), labels)

    return SoakTraining(torch.optim.SGD(model.parameters(), 1e-3), loss)


def encoder(dtype: torch.dtype, row_multiple: int) -> SoakTraining:
    """Return an encoder of sequences of any lengths, which read from banks of any size."""
    reader = layers.TapeReader(DIM, num_tape_tokens=6, topk=2, halt_threshold=2.0, query="gap")
    stack = [layers.ElasticEncoderLayer(DIM, HEADS, 128, tape_ffn_dim=64) for _ in range(2)]
    model = layers.ElasticEncoder(stack, DIM, readers={1: reader}, row_multiple=row_multiple)
    model.to(dtype)

    def loss(sizes: SoakSizes) -> Tensor:
        x = ElasticBatch.from_packed(*packed(sizes, dtype, 16, 200))
        y, _ = model(x, sizes.bank(dtype, x.batch, DIM).detach())
        return y.pool("mean").float().square().sum()

    return SoakTraining(torch.optim.SGD(model.parameters(), 1e-3), loss)


OPS = (tape_select, tape_read, elastic_attention, dual_ffn, add_layer_norm)


def work(sizes: SoakSizes) -> Iterator[None]:
    """Run every op and a step of every model in both dtypes, again and again; yield after each."""
    multiple = 1 if sizes.exact else ROW_MULTIPLE
    trained = [make(dtype, multiple) for make in (vit, encoder) for dtype in DTYPES]
    while True:
        for op in OPS:
            for dtype in DTYPES:
                op(sizes, dtype)
                yield
        for training in trained:
            training.step(sizes)
            yield


def soak(sizes: SoakSizes, minutes: float, warm_up: float) -> float:
    """Print the resident memory by minute, and return its growth once the warm-up is over.

    Args:
        sizes: what draws the sizes.
        minutes: how long to run.
        warm_up: of these, how many count as warm-up.

    Returns:
        The most that was resident after the warm-up over what was resident at its end.
    """
    calls, start = 0, time.perf_counter()
    lines = max(1, round(minutes))
    each = minutes / lines
    print(f"{'minute':>7} {'calls':>9} {'resident MB':>12}", flush=True)
    settled: list[float] = []
    running = work(sizes)
    for line in range(1, lines + 1):
        while time.perf_counter() - start < 60 * each * line:
            next(running)
            calls += 1
        resident = resident_megabytes()
        print(f"{each * line:7.2f} {calls:9,} {resident:12,.0f}", flush=True)
        if each * line >= warm_up:
            settled.append(resident)
    return max(settled, default=0.0) / (settled[0] if settled else 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak as the arguments ask, and return 1 if memory grew by more than a tenth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=2.0, help="minutes; default: 2")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="round no number of rows up")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    sizes = SoakSizes(Random(arguments.seed), arguments.exact)
    growth = soak(sizes, arguments.minutes, arguments.warm_up)
    print(f"after {arguments.warm_up:g} minutes resident memory grew to {growth:.3f} times itself")
    return int(growth > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
