"""Whether a file that was exported computes what the model computes."""

import copy

import torch
from torch import Tensor

from adatape_kernels.models import AdaTape
from adatape_kernels.recipes.exporting.artefacts import Served
from adatape_kernels.recipes.exporting.traced_program import Options, example_inputs

_BATCH_SIZES = (1, 2, 3, 7)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
# Of roundings of the largest logit, for a dtype in which two orders of a sum choose other tokens.
_ROUNDINGS = 4


class Disagreement(RuntimeError):
    """An exported file computes something else than the model; the message says how far off."""


@torch.inference_mode()
def compare(served: Served, model: AdaTape, options: Options) -> tuple[tuple[int, ...], float]:
    """Compare on random inputs, in batches of sizes that the program was not traced with.

    In float32 and float64 every logit has to agree, and every number of tape tokens. In a narrower
    dtype rounding alone makes some inputs read other tokens, so there the mean error of an input is
    compared with the model's own, both against the model in float32.

    Returns:
        The sizes of the batches, and the largest difference of a logit.

    Raises:
        Disagreement: they differ.
    """
    most = options.batch
    sizes = tuple(size for size in _BATCH_SIZES if most is None or size <= most)
    if most is not None and _BATCH_SIZES[-1] < most <= 16:
        sizes += (most,)
    difference = 0.0
    found, expected, inputs = [], [], []
    for size in sizes:
        given = example_inputs(model, size, seed=size)
        capacity = None if options.capacity is None else size * options.capacity
        output = model(given, capacity=capacity)
        logits, tape_lens = served(given)
        if logits.shape != output.logits.shape or tape_lens.shape != output.tape_lens.shape:
            raise Disagreement(
                f"export: expected logits {tuple(output.logits.shape)} of {size} inputs, "
                f"got {tuple(logits.shape)}"
            )
        difference = max(difference, _largest(logits, output.logits))
        found.append((logits, tape_lens))
        expected.append((output.logits, output.tape_lens))
        inputs.append(given)
    ours, theirs = torch.cat([a for a, _ in expected]), torch.cat([a for a, _ in found])
    scale = max(1.0, ours.abs().max().item())
    if ours.dtype in _TOLERANCE:
        others = sum(int((a != b).sum()) for (_, a), (_, b) in zip(expected, found, strict=True))
        allowed = _TOLERANCE[ours.dtype] * scale
        if not difference <= allowed or others:
            raise Disagreement(
                f"export: expected the model's logits to {allowed:.1g} and its tape tokens, got a "
                f"difference of {difference:.1g}, and other tape tokens for {others} of "
                f"{len(ours)} inputs"
            )
        return sizes, difference
    exact = copy.deepcopy(model).float()
    precise = torch.cat([exact(given.float()).logits for given in inputs])
    own, came = _mean_error(ours, precise), _mean_error(theirs, precise)
    allowed = 2 * own + _ROUNDINGS * torch.finfo(ours.dtype).eps * scale
    if not came <= allowed:
        raise Disagreement(
            f"export: expected a mean error of up to {allowed:.1g} against float32, twice the "
            f"model's own in {ours.dtype}, got {came:.1g}"
        )
    return sizes, difference


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, NaN where one is NaN, 0 of nothing."""
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def _mean_error(logits: Tensor, precise: Tensor) -> float:
    """Return the mean over inputs of the largest error of a logit."""
    return (logits.double() - precise.double()).abs().amax(1).mean().item()
