"""What else reads a tape: loops in plain torch, also compiled, and as a CUDA graph.

No other library has the recurrent reader. The loops make a fixed number of steps, as the padded
model does: an example that has halted computes on, and what it computes is dropped. They score in
float32, since scores that are rounded to bfloat16 select other entries.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.benchmarks.harness.cases import (
    GRAPH,
    Prepared,
    Provider,
    agree,
    skipped,
    with_backend,
)
from adatape_kernels.models.padded import batched_topk_select
from adatape_kernels.op_types import TapeSelection, wide_dtype

BANKS = ("input", "learn")


class BankKind(str):
    """Whether every example has its own bank, or all share a learnable one."""

    meaning = " or ".join(BANKS)

    def __new__(cls, value: object) -> "BankKind":
        text = super().__new__(cls, value)
        if text not in BANKS:
            raise ValueError(value)
        return text

    def shape(self, batch: int, bank_size: int, dim: int) -> tuple[int, ...]:
        return (bank_size, dim) if self == "learn" else (batch, bank_size, dim)


def check(shape: Any) -> None:
    """Raise ValueError where the bank holds too few tokens."""
    if shape.M < shape.k:
        raise ValueError(f"shape: expected M from k = {shape.k} on, got {shape.M}")
    if shape.k > 32:
        raise ValueError(f"shape: expected k up to 32, got {shape.k}")


class ReadInputs(NamedTuple):
    """A normalised query and bank, how they are read, and the gradients of what is read."""

    query: Tensor
    """(batch, key_dim)."""
    bank: Tensor
    """([batch,] bank_size, dim), whose leading key_dim features are the keys."""
    options: dict[str, Any]
    dweights: Tensor
    """(batch, num_tape_tokens, topk)."""
    dponder: Tensor
    """(batch,)."""
    dtape: Tensor | None
    """(batch, num_tape_tokens, dim), where the tape is gathered."""
    backward: bool

    def double(self) -> "ReadInputs":
        """Return the same inputs in float64."""
        query, bank = (
            x.detach().double().requires_grad_(self.backward) for x in (self.query, self.bank)
        )
        dweights, dponder = self.dweights.double(), self.dponder.double()
        dtape = None if self.dtape is None else self.dtape.double()
        return self._replace(
            query=query, bank=bank, dweights=dweights, dponder=dponder, dtape=dtape
        )

    def finish(
        self, selection: TapeSelection, tape: Tensor | None = None, dtape: Tensor | None = None
    ) -> list[Tensor]:
        """Return all results; the gradients of query and bank come last."""
        outputs, cotangents = [selection.weights, selection.ponder], [self.dweights, self.dponder]
        if tape is not None and dtape is not None:
            outputs.append(tape)
            cotangents.append(dtape)
        grads: Sequence[Tensor] = ()
        if self.backward:
            grads = torch.autograd.grad(outputs, (self.query, self.bank), cotangents)
        return [selection.indices, *outputs, *grads]


def read_inputs(
    batch: int,
    bank: tuple[int, ...],
    key_dim: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    device_type: str,
    *,
    backward: bool,
    gathers: bool,
) -> ReadInputs:
    num_tape_tokens, topk = options["num_tape_tokens"], options["topk"]
    with torch.device(device_type):
        query, values = (
            F.layer_norm(torch.randn(shape), shape[-1:]).to(dtype).requires_grad_(backward)
            for shape in ((batch, key_dim), bank)
        )
        dtape = torch.randn(batch, num_tape_tokens, bank[-1]).to(dtype) if gathers else None
        dweights, dponder = torch.randn(batch, num_tape_tokens, topk), torch.randn(batch)
    return ReadInputs(query, values, options, dweights, dponder, dtape, backward)


def loop(query: Tensor, keys: Tensor, **options: Any) -> TapeSelection:
    """Read as the padded model does: a product and a `torch.topk` a step, for the whole batch."""
    wide = wide_dtype(query.dtype)
    return batched_topk_select(
        query.to(wide), keys.to(wide), average_query=True, loss_type="entropy", **options
    )


def loop_and_gather(query: Tensor, bank: Tensor, **options: Any) -> tuple[TapeSelection, Tensor]:
    """Read so, and merge the tape as the padded model does: (batch, num_tape_tokens, dim)."""
    selection = loop(query, bank[..., : query.shape[1]], **options)
    return selection, padded_gather(bank, selection.indices, selection.weights)


def padded_gather(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return tape tokens (batch, num_tape_tokens, dim), zero where none was read."""
    chosen = indices.clamp(min=0).long()
    if bank.dim() == 3:
        batch = torch.arange(len(bank), device=bank.device)
        rows = bank[batch.view(-1, 1, 1), chosen]
    else:
        rows = bank[chosen]
    return (weights.to(bank.dtype).unsqueeze(2) @ rows).squeeze(2)


NAMES = ("eager", "loop", "loop, compiled", f"loop{GRAPH}")


def providers(
    ours: Callable[[ReadInputs], Prepared],
    peer: Callable[..., Callable[[ReadInputs], Prepared]],
    function: Callable[..., Any],
    device_type: str,
) -> list[Provider]:
    """Return all peers in the order of NAMES; `peer` makes one of a function of query and bank."""
    eager, plain, compiled, graph = NAMES
    compile_once = torch.compile(function, dynamic=False)
    found = [
        with_backend(Provider(eager, ours, graph=False), "eager"),
        Provider(plain, peer(function)),
        Provider(compiled, peer(compile_once), compiled=True),
    ]
    if device_type == "cpu":
        found.append(skipped(graph, "CUDA graphs are for CUDA only"))
    return found


def agree_on_reads(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, shared: bool = False
) -> str | None:
    """Compare, as `agree` does, the examples that read the same entries of the bank.

    Scores that differ only in their last bits change places when they are summed in another order,
    so one example, and one in fifty more, may read other entries. In a shared bank's gradient,
    which is the last result, the rows that such an example read are left out.
    """
    (indices, *_), (exact_indices, *_) = found, expected
    same = (indices == exact_indices).flatten(1).all(1)
    differing = int((~same).sum())
    if differing > 1 + len(same) // 50:
        return f"{differing} of {len(same)} examples read other entries"
    rows = [same] * len(found)
    if shared:
        *_, dbank = found
        read = torch.cat([indices[~same], exact_indices[~same]]).flatten()
        unread = torch.ones(len(dbank), dtype=torch.bool, device=same.device)
        unread[read.clamp(min=0).long()] = False
        rows = [*rows[:-1], unread]
    alike = [[x[r] for x, r in zip(xs, rows, strict=True)] for xs in (found, expected)]
    return agree(*alike, tolerance)
