"""One run of the parity table: training from a seed, and the accuracy on fixed sequences."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from adatape_kernels.data.parity_sequences import (
    ParitySequences,
    sparse_sequences,
    uniform_sequences,
)
from adatape_kernels.models import Classifier
from adatape_kernels.recipes.devices import CPU, device_of, moved, wait
from adatape_kernels.recipes.parity.growing_lengths import GrowingLengths
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Protocol, Run
from adatape_kernels.recipes.parity.parity_models import new_model, num_parameters
from adatape_kernels.recipes.training.deterministic_mode import repeatable
from adatape_kernels.recipes.training.execution import Execution, computing_in
from adatape_kernels.recipes.training.train_loop import epoch_generator
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.train_step import StepTally, add_gradients

_EVAL_SEED = 20_260_101
_EVAL_BATCH = 400
_CURVE_POINTS = 25
# Sequences that a point of the curve is measured on, of those that the result is.
_CURVE_EXAMPLES = 1600


@dataclass(frozen=True)
class ParityResult:
    """What came out of a run."""

    model: str
    length: int
    seed: int
    accuracy: float
    """Share of the evaluation sequences whose label is right."""
    trained_accuracy: float
    """The same of sequences as they are trained on, which is equal but for `extrapolate`."""
    seconds: float
    """What training took, without evaluation."""
    parameters: int
    steps: int
    """Number of steps of the optimizer."""
    work_per_example: float
    """Tape tokens that an evaluation sequence reads, or steps that it takes, on average."""
    curve: tuple[tuple[int, float, float], ...]
    """Steps behind, training loss since the last point, and accuracy on some of the sequences."""

    def entries(self) -> dict[str, Any]:
        """Return what report.json holds of it."""
        return {**asdict(self), "curve": [list(point) for point in self.curve]}


def eval_sequences(
    length: int, count: int, protocol: Protocol = "uniform", *, as_trained: bool = False
) -> ParitySequences:
    """Return the sequences that every model is measured on, the same for every seed.

    Args:
        length: number of symbols of a sequence.
        count: number of sequences.
        protocol: what is measured on.
        as_trained: whether to take sequences as in training where the protocol tells the two apart.
    """
    generator = epoch_generator(_EVAL_SEED, length)
    if protocol == "uniform":
        return uniform_sequences(count, length, generator)
    half = length // 2
    return sparse_sequences(
        count, length, (1, half) if as_trained else (half + 1, length), generator
    )


def train(
    run: Run,
    config: ParityConfig,
    progress: Callable[[int, float, float | None], None],
    device: torch.device = CPU,
) -> tuple[Classifier, ParityResult]:
    """Train one model.

    Args:
        run: which one.
        config: how.
        progress: called with the number of steps, the last loss and the last accuracy that are
            known: behind each step on a CPU, and on a GPU whenever it has been waited for.
        device: where to compute.

    Raises:
        RuntimeError: the loss is not finite; the error names run and step.
    """
    torch.manual_seed(run.seed)
    uniform = config.protocol == "uniform"
    sequence_token = config.has_sequence_token(run.length)
    model = new_model(run.model, run.length, sequence_token=sequence_token).to(device)
    execution = Execution(config.dtype)
    growing = GrowingLengths(run.length, config.growing_share(run.length) * config.steps)
    # An epoch is a step, for which the plan's learning rate is made.
    plan = TrainPlan(
        1, config.batch, config.lr, weight_decay=0.0, warmup_share=0.1, max_grad_norm=1.0
    )
    optimizer = plan.optimizer(model)
    generator = epoch_generator(run.seed, run.length)
    evaluation = eval_sequences(run.length, config.eval_examples, config.protocol)
    as_trained = eval_sequences(run.length, config.eval_examples, config.protocol, as_trained=True)
    some = ParitySequences(*(part[:_CURVE_EXAMPLES] for part in as_trained))
    every = max(1, config.steps // _CURVE_POINTS)
    curve: list[tuple[int, float, float]] = []
    seconds, losses = 0.0, 0.0
    tally = StepTally(device, lambda step: f"in {run.stem} at step {step + 1}")
    with repeatable():
        wait(device)
        start = time.perf_counter()
        for step in range(config.steps):
            longest = growing.at(step)
            sequences = _training_sequences(run.length, longest, config, generator)
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate_at(step, config.steps)
            optimizer.zero_grad()
            sums = add_gradients(
                model, model.loss, sequences.one_hot(), sequences.labels, device, execution
            )
            tally.add(step, len(sequences.labels), sums)
            if growing.decides(step):
                tally.read()
                growing.learn(tally.last_right)
            nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
            optimizer.step()
            done, last = step + 1, step + 1 == config.steps
            if done % every == 0 or last:
                tally.read()
                wait(device)
                seconds += time.perf_counter() - start
                if done % every == 0:
                    loss = (tally.loss - losses) / (every * config.batch)
                    curve.append((done, loss, measure(model, some, config.dtype)[0]))
                    losses = tally.loss
                start = time.perf_counter()
            if tally.steps:
                progress(done, tally.last_loss, curve[-1][2] if curve else None)
        accuracy, work = measure(model, evaluation, config.dtype)
        trained_accuracy = accuracy
        if not uniform:
            trained_accuracy = measure(model, as_trained, config.dtype)[0]
    return model, ParityResult(
        *run,
        accuracy,
        trained_accuracy,
        seconds,
        num_parameters(model),
        config.steps,
        work,
        tuple(curve),
    )


def _training_sequences(
    length: int, longest: int, config: ParityConfig, generator: torch.Generator
) -> ParitySequences:
    """Return the new sequences of a step.

    Args:
        length: number of symbols of the sequences that are measured.
        longest: most symbols of a sequence of this step.
        config: what is trained on, and on how many sequences a step.
        generator: where the random numbers come from.
    """
    uniform = config.protocol == "uniform"
    if uniform and longest == length:
        return uniform_sequences(config.batch, length, generator)
    # Half as long up to the longest, and with few symbols up to nothing but symbols that are not 0:
    # the ones with few symbols are learned first, and no model relies on many zeros. Pairs leave
    # nothing over but in the longest, where it is odd.
    half = int(torch.randint(max(1, longest // 4), (longest + 1) // 2 + 1, (), generator=generator))
    some = min(2 * half, longest)
    most = some if uniform else min(some, length // 2)
    return sparse_sequences(config.batch, some, (1, most), generator)


def measure(
    model: Classifier, sequences: ParitySequences, dtype: str = "float32"
) -> tuple[float, float]:
    """Return a model's accuracy and its mean work, tape tokens or steps, in evaluation mode.

    Args:
        model: the model, which computes where it is.
        sequences: what it is measured on.
        dtype: what products are computed in, one of `execution.DTYPES`.
    """
    was_training, device, count = model.training, device_of(model), len(sequences.labels)
    model.eval()
    found = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad(), computing_in(dtype, device):
        for start in range(0, count, _EVAL_BATCH):
            part = ParitySequences(*(x[start : start + _EVAL_BATCH] for x in sequences))
            output = model(moved(part.one_hot(), device))
            right = output.logits.argmax(1) == moved(part.labels, device)
            work = output.tape_lens if output.halted is None else output.halted.steps
            found += torch.stack([right.sum(), work.sum()])
    model.train(was_training)
    right_share, mean_work = (found / count).tolist()
    return right_share, mean_work
