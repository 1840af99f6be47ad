"""What a trained AdaTape reads of a sequence, in which order, and how its query moves meanwhile."""

import io
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.data.parity_sequences import ParitySequences
from adatape_kernels.models import AdaTapeParity
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes.devices import device_of, moved

# Grey values that stay apart in print, and marks that need no colour.
_SHADES = {1: "#1b1b1b", 0: "#8f8f8f", -1: "#dcdcdc"}
UNREAD = 9
_EVEN_ODD = (("#0072b2", "o", "even"), ("#d55e00", "x", "odd"))


class Reading(NamedTuple):
    """A read, step by step."""

    symbols: Tensor
    """(batch, num_tape_tokens, topk) int64 symbols that each step merged, or UNREAD."""
    queries: Tensor
    """(batch, num_tape_tokens + 1, key_dim) the query before each step and behind the last; the
    last one repeated once an example has halted."""
    counts: Tensor
    """(batch,) steps taken."""


def reading_of(model: AdaTapeParity, sequences: ParitySequences) -> Reading:
    """Return what a model reads of each sequence, and the queries by the definition (SPEC 3).

    Args:
        model: the model, which computes where it is.
        sequences: what it reads.

    Returns:
        What was read, on the CPU.
    """
    was_training = model.training
    model.eval()
    reader = next(reader for _, reader in model.encoder.stages() if reader is not None)
    with torch.no_grad():
        inputs = moved(sequences.one_hot(), device_of(model))
        selection = model(inputs).reads[0]
        embedded = model.embed_elastic(inputs)
        pooled = embedded.tokens.pool("token" if reader.query == "token" else "mean")
        values, query, _ = reader.normalised(embedded.bank, pooled)
    model.train(was_training)
    selection = TapeSelection(*(part.cpu() for part in selection))
    values, query = values.cpu(), query.cpu()
    keys, query = values[..., : reader.key_dim], query[:, : reader.key_dim]
    example = torch.arange(len(query))[:, None]
    queries, symbols = [query], []
    for step in range(reader.num_tape_tokens):
        indices = selection.indices[:, step].long()
        taken = (selection.counts > step)[:, None]
        merged = (selection.weights[:, step, :, None] * keys[example, indices.clamp(min=0)]).sum(1)
        averaged = (queries[-1] + merged) / 2 if reader.average_query else merged
        queries.append(averaged.where(taken, queries[-1]))
        read = sequences.symbols[example, indices.clamp(min=0)]
        symbols.append(read.where(taken, UNREAD))
    return Reading(torch.stack(symbols, 1), torch.stack(queries, 1), selection.counts)


def pairs_tell_parity(reading: Reading, labels: Tensor) -> float:
    """Return the share of sequences whose label is the number of steps that split a pair of ones.

    That is a step which merges a one with another symbol. A model that reads all ones first, two at
    a time, has such a step where their number is odd, and none where it is even.
    """
    is_one = reading.symbols == 1
    split = (is_one.any(2) & ~is_one.all(2)).sum(1)
    return (split == labels).double().mean().item()


def drawn_reads(model: AdaTapeParity, sequences: ParitySequences) -> bytes:
    """Return the picture as PNG.

    Above: the symbols that each step merges, a line of squares for each of some sequences, in the
    order of their numbers of ones. Below: the query's first principal component over the steps, and
    its first two behind the last one, by whether the number of ones is odd.
    """
    import matplotlib
    from matplotlib.figure import Figure

    reading = reading_of(model, sequences)
    ones = (sequences.symbols == 1).sum(1)
    components = _principal(reading.queries)
    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(9, 7.2), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        _draw_order(parts[0].subplots(), reading, ones)
        over_steps, last = parts[1].subplots(1, 2)
        for parity, (color, marker, name) in enumerate(_EVEN_ODD):
            own = sequences.labels == parity
            middle = components[own, :, 0].mean(0)
            steps = range(len(middle))
            over_steps.plot(steps, components[own, :, 0].T, color=color, alpha=0.06, linewidth=0.6)
            style = "-" if parity == 0 else "--"
            over_steps.plot(steps, middle, style, color=color, label=f"{name}: mean", linewidth=2)
            final = components[own, -1]
            last.plot(
                final[:, 0], final[:, 1], marker, color=color, markersize=4, alpha=0.6,
                markerfacecolor="none", label=f"number of ones {name}",
            )  # fmt: skip
        over_steps.set(xlabel="steps of the read", ylabel="query, first principal component")
        over_steps.xaxis.get_major_locator().set_params(integer=True)
        last.set(xlabel="query behind the last step: first component", ylabel="second component")
        for axis in (over_steps, last):
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, dpi=130)
        return content.getvalue()


def _draw_order(axis: Any, reading: Reading, ones: Tensor, most: int = 24) -> None:
    """Draw what each step merges, for sequences with few ones (above) to many."""
    from matplotlib.patches import Patch

    order = ones.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(most, len(order))).long()]
    topk = reading.symbols.shape[2]
    for row, example in enumerate(chosen.tolist()):
        for step in range(int(reading.counts[example])):
            for place, symbol in enumerate(reading.symbols[example, step].tolist()):
                axis.barh(
                    row, 0.9 / topk, 0.8, left=step + 0.9 * place / topk,
                    color=_SHADES[symbol], edgecolor="none",
                )  # fmt: skip
    axis.set_yticks(range(len(chosen)), [str(n) for n in ones[chosen].tolist()], fontsize=7)
    axis.invert_yaxis()
    axis.set(
        xlabel="steps of the read", ylabel="number of ones", xlim=(0, reading.symbols.shape[1])
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    handles = [Patch(facecolor=_SHADES[s], edgecolor="0.5", label=f"symbol {s}") for s in _SHADES]
    axis.figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    axis.set_title("What each step merges, the better one first", loc="left")


def _principal(states: Tensor) -> Tensor:
    """Return the first two principal components of states (batch, steps, features), (…, 2)."""
    flat = states.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    found = centred @ directions.T
    missing = 2 - found.shape[1]
    if missing > 0:
        found = torch.nn.functional.pad(found, (0, missing))
    return found.unflatten(0, states.shape[:2])
