"""Check this package against files of results that the public JAX code computed (SPEC 10).

`check` compares kernels with float64 on this machine; this compares the package with what others
computed.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import ops, scenic
from adatape_kernels.data.npz_file import NpzFile, UnreadableFile
from adatape_kernels.data.printable import printable
from adatape_kernels.layers import NORM_EPS
from adatape_kernels.models import (
    AdaTapeOutput,
    AdaTapeParityConfig,
    AdaTapeViTConfig,
    ViTConfig,
)
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.ops.op import NotServed, Ran, record
from adatape_kernels.recipes.full_precision import without_tf32
from adatape_kernels.recipes.golden_file import check_baseline, check_model, check_read
from adatape_kernels.recipes.halting_record import HaltingRecord, recording

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4
ZERO_TOLERANCE = 1e-5
LOSS_WEIGHT = 0.1

_MOST_SHOWN = 300
_FAULTS = (
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
)


@dataclass(frozen=True)
class Comparison:
    """One tensor of a file beside ours."""

    name: str
    error: float
    """Largest difference, relative to the file's largest magnitude unless `absolute`."""
    tolerance: float
    absolute: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is within tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class FileReport:
    """How this package reproduces one file."""

    path: Path
    counts_agree: bool
    comparisons: tuple[Comparison, ...]
    ran: tuple[Ran, ...]
    """The ops that were called, each with the backend that served it."""

    @property
    def passed(self) -> bool:
        """Whether the counts agree and every tensor is within tolerance."""
        return self.counts_agree and all(c.passed for c in self.comparisons)

    @property
    def served(self) -> str:
        """Which backend served which ops, as it was recorded."""
        ops_of: dict[str, list[str]] = {}
        for op, backend in dict.fromkeys(self.ran):
            ops_of.setdefault(backend, []).append(op)
        return "; ".join(f"{backend} ran {', '.join(names)}" for backend, names in ops_of.items())

    def lines(self) -> list[str]:
        """Return the report as text, a line for each output and gradient."""
        agree = "agree" if self.counts_agree else "DIFFER"
        verdict = "ok" if self.passed else "FAILED"
        lines = [f"{printable(self.path)}: {verdict}, counts {agree}, {self.served}"]
        width = max(len(c.name) for c in self.comparisons)
        for c in self.comparisons:
            kind = "abs" if c.absolute else "rel"
            bad = "" if c.passed else "  OVER TOLERANCE"
            lines.append(f"  {c.name:<{width}}  {kind} {c.error:.1e} (<= {c.tolerance:.0e}){bad}")
        return lines


def verify_file(path: str | Path, device: torch.device | str = "cpu") -> FileReport:
    """Recompute a golden file's outputs, counts and gradients, and compare.

    Args:
        path: an .npz file of kind tape_read, adatape_vit, adatape_parity, vit or uvit, as in
            SPEC 10.
        device: where to compute. On a GPU without TF32, whose noise would change what is read.

    Raises:
        ValueError: the file cannot be read, lacks an entry, or has one of another shape or type.
    """
    path = Path(path)
    try:
        with NpzFile(path) as arrays:
            config = scenic.read_config(arrays, path)
            kind = config["kind"]
            check = _CHECKS[kind] if isinstance(kind, str) and kind in _CHECKS else _verify_model
            with torch.device(device), without_tf32(), record() as ran:
                counts_agree, comparisons = check(arrays, config)
    except (UnreadableFile, NotServed):
        raise  # the one names the file, and to the other the file is not to blame
    except KeyError as error:
        raise ValueError(f"{printable(path)}: expected an entry {error}, got none") from None
    # Sizes are checked before; what a file still brings about is one line, as the next file waits.
    except _FAULTS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{printable(path)}: {printable(reason, _MOST_SHOWN)}") from None
    return FileReport(path, counts_agree, tuple(comparisons), tuple(ran))


def _verify_read(arrays: NpzFile, config: Mapping[str, Any]) -> tuple[bool, list[Comparison]]:
    """Check one read: norm, selection and gathering."""
    check_read(arrays, config)
    bank_name = "params/tape_tokens" if config["bank_type"] == "learn" else "bank"
    names = ("query", bank_name, "params/bank_norm/scale", "params/bank_norm/bias")
    leaves = {name: _leaf(arrays[name]) for name in names}
    query, bank, scale, bias = leaves.values()
    dim = query.shape[1]
    key_dim, num_tape_tokens = dim // config["split"], config["max_tape_tokens"]
    values = F.layer_norm(bank, (dim,), scale, bias, NORM_EPS)
    selection = ops.tape_select(
        F.layer_norm(query, (dim,), scale, bias, NORM_EPS)[:, :key_dim],
        values[..., :key_dim],
        num_tape_tokens=num_tape_tokens,
        topk=config["tokens_merged_per_step"],
        halt_threshold=config["halt_threshold"],
        average_query=config["average_query"],
        loss_type=config["loss_type"],
    )
    tape, _ = ops.tape_gather(values, selection.indices, selection.weights, selection.counts)
    exists = torch.arange(num_tape_tokens) < selection.counts.unsqueeze(1)
    tokens = tape.new_zeros(len(query), num_tape_tokens, dim).index_put((exists,), tape)
    objective = (tokens * torch.tensor(arrays["cotangent_tokens"])).sum()
    objective = objective + (selection.ponder * torch.tensor(arrays["cotangent_loss"])).sum()
    objective.backward()
    comparisons = [
        _compare("tokens", tokens, arrays["tokens"], OUTPUT_TOLERANCE),
        _compare("atr_loss", selection.ponder, arrays["atr_loss"], OUTPUT_TOLERANCE),
    ]
    for name, leaf in leaves.items():
        comparisons.append(_compare_gradient(f"grad_{name}", leaf.grad, arrays[f"grad_{name}"]))
    return np.array_equal(selection.counts.cpu().numpy(), arrays["n_read"]), comparisons


def _verify_model(arrays: NpzFile, config: Mapping[str, Any]) -> tuple[bool, list[Comparison]]:
    """Check a whole AdaTape, whose images are NHWC."""
    ours = scenic.model_config(config)
    if not isinstance(ours, AdaTapeViTConfig | AdaTapeParityConfig):
        raise ValueError(f"kind: expected that of an AdaTape, got {config['kind']!r}")
    check_model(arrays, ours)
    run = _Run(arrays, config)
    ponder = run.output.ponder[:, -1]
    # The file holds the ponder loss of the last read only, and so does its objective.
    comparisons = [
        _compare("logits", run.output.logits, arrays["logits"], OUTPUT_TOLERANCE),
        _compare("atr_loss", ponder, arrays["atr_loss"], OUTPUT_TOLERANCE),
        *run.gradients(ponder.sum()),
    ]
    return _counts_agree(run.output.reads, arrays["mask"]), comparisons


def _verify_baseline(arrays: NpzFile, config: Mapping[str, Any]) -> tuple[bool, list[Comparison]]:
    """Check a ViT, or a UViT, whose examples or rows halt."""
    ours = scenic.model_config(config)
    assert isinstance(ours, ViTConfig)
    check_baseline(arrays, ours)
    run = _Run(arrays, config)
    comparisons = [_compare("logits", run.output.logits, arrays["logits"], OUTPUT_TOLERANCE)]
    halted = run.output.halted
    if halted is None:
        return True, [*comparisons, *run.gradients(None)]
    cost = halted.steps + halted.remainders
    for name, values in (
        ("ponder_times", halted.steps.to(cost.dtype)),
        ("remainders", halted.remainders),
        ("ponder_loss", cost.mean()),
    ):
        comparisons.append(_compare(name, values, arrays[name], OUTPUT_TOLERANCE))
    counts_agree = np.array_equal(halted.steps.cpu().numpy(), arrays["n_steps"])
    record = run.record
    assert record is not None
    for name, steps in (
        ("halting_scores", record.scores()),
        ("halting_probability", record.sums()),
    ):
        # Of runs that stop after different numbers of steps the first steps can be compared.
        theirs = arrays[name]
        counts_agree &= len(steps) == len(theirs)
        common = min(len(steps), len(theirs))
        comparisons.append(_compare(name, steps[:common], theirs[:common], OUTPUT_TOLERANCE))
    return counts_agree, [*comparisons, *run.gradients(cost.sum())]


class _Run:
    """A model of a file, and what it made of the file's inputs."""

    def __init__(self, arrays: NpzFile, config: Mapping[str, Any]):
        self.arrays = arrays
        params = arrays.below("params/")
        self.targets = scenic.check_params(params, scenic.model_config(config))
        self.model = scenic.load(params, config).to(torch.get_default_device()).eval()
        self.inputs = _leaf(arrays["inputs"])
        given = self.inputs.permute(0, 3, 1, 2) if self.inputs.dim() == 4 else self.inputs
        self.record: HaltingRecord | None = None
        with contextlib.ExitStack() as recorded:
            unit = getattr(self.model.encoder, "unit", None)
            if unit is not None:
                self.record = recorded.enter_context(recording(unit))
            self.output: AdaTapeOutput = self.model(given)

    def gradients(self, cost: Tensor | None) -> list[Comparison]:
        """Compare the gradients of the file's objective, which charges a cost if there is one."""
        arrays = self.arrays
        objective = (self.output.logits * torch.tensor(arrays["cotangent_logits"])).sum()
        (objective if cost is None else objective + LOSS_WEIGHT * cost).backward()
        comparisons = [_compare_gradient("grad_inputs", self.inputs.grad, arrays["grad_inputs"])]
        gradients = {
            key: torch.zeros_like(p) if p.grad is None else p.grad
            for key, p in self.model.named_parameters()
        }
        for name, target in self.targets.items():
            theirs = target.converted(arrays[f"grad_{name}"])
            ours = target.of(gradients)
            comparisons.append(_compare_gradient(f"grad_{name}", ours, theirs))
        return comparisons


def _counts_agree(reads: tuple[TapeSelection, ...], mask: np.ndarray) -> bool:
    """Compare the mask with that of our counts: all inputs, then a block for each read."""
    num_tape_tokens = reads[0].indices.shape[1]
    inputs = mask.shape[1] - num_tape_tokens * len(reads)
    counts = torch.stack([read.counts for read in reads], 1).cpu()
    exists = torch.arange(num_tape_tokens, device="cpu") < counts.unsqueeze(2)
    ours = F.pad(exists.flatten(1).float(), (inputs, 0), value=1.0)
    return np.array_equal(ours.numpy(), mask)


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array).requires_grad_()


def _compare(name: str, ours: Tensor, theirs: np.ndarray, tolerance: float) -> Comparison:
    if tuple(ours.shape) != theirs.shape:
        raise ValueError(f"{name}: expected {tuple(ours.shape)}, got {theirs.shape}")
    with np.errstate(all="ignore"):  # NaN and infinity are over every tolerance
        difference = np.abs(ours.detach().cpu().numpy() - theirs).max(initial=0.0)
        scale = np.abs(theirs).max(initial=0.0)
        if scale == 0:
            return Comparison(name, float(difference), ZERO_TOLERANCE, absolute=True)
        return Comparison(name, float(difference / scale), tolerance)


def _compare_gradient(name: str, ours: Tensor | None, theirs: np.ndarray) -> Comparison:
    ours = torch.zeros(theirs.shape) if ours is None else ours
    if name.endswith("key/bias"):
        # Softmax does not see a bias of the keys: the exact gradient is 0, the rest is rounding.
        largest = torch.stack([ours.abs().max().cpu(), torch.tensor(theirs).abs().max().cpu()])
        return Comparison(name, float(largest.max()), ZERO_TOLERANCE, absolute=True)
    return _compare(name, ours, theirs, GRADIENT_TOLERANCE)


_CHECKS = {"tape_read": _verify_read, "vit": _verify_baseline, "uvit": _verify_baseline}
"""What checks a file of a kind; files of all other kinds hold an AdaTape."""
