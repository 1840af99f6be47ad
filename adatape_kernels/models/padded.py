"""The padded model: AdaTape in plain torch, on dense tensors and a mask.

This is AdaTape as one would port it without kernels. Every read appends num_tape_tokens positions
to every example, a mask says which of them exist, and attention, feed-forwards and norms run over
all of them. The padded model shares the parameters of an elastic model, whose results and speed
are compared with its own.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from adatape_kernels import reference
from adatape_kernels.arguments import check_kind
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers import ElasticEncoder, ElasticModule, TapeReader
from adatape_kernels.layers.reader import ReadBudget
from adatape_kernels.layers.torch_modules import make_weights
from adatape_kernels.models.config import AdaTapeConfig
from adatape_kernels.models.cross_entropy import LossKind
from adatape_kernels.models.embedding import Embedded, ModelInputs
from adatape_kernels.models.output import AdaTapeOutput, stack_ponder
from adatape_kernels.models.padded_layer import encode_padded
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.pooling import Pooling


class ElasticModel(Protocol):
    """What the padded model uses of an elastic model, which is a torch module; AdaTape has it."""

    encoder: ElasticEncoder
    head: nn.Linear
    bank_repeats_rows: bool

    @property
    def config(self) -> AdaTapeConfig:
        """Sizes and choices."""
        ...

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens (batch, seqlen, dim) and the bank (batch, bank_size, dim), if any."""
        ...

    def embed_elastic(self, inputs: ModelInputs) -> Embedded:
        """Return the tokens, the bank and the banks' lengths of examples of many sizes."""
        ...

    def loss(
        self,
        output: AdaTapeOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        kind: LossKind = "softmax",
    ) -> Tensor:
        """Return the loss of an output, a scalar."""
        ...


@dataclass(frozen=True)
class _PaddedTokens:
    """A batch that has a position for every tape token that an example could have read."""

    data: Tensor
    """(batch, positions, dim), the input positions before the tape positions."""
    mask: Tensor
    """(batch, positions) bool, True where a token exists."""
    num_inputs: int
    """Number of input positions."""

    def pool(self, kind: Pooling, num_registers: int = 0) -> Tensor:
        """Reduce the positions that exist, without registers, as the elastic model does."""
        if kind == "token":
            return self.data[:, 0]
        mask = self.mask.clone()
        mask[:, :num_registers] = False
        mask, lens = mask.unsqueeze(2), mask.sum(1, keepdim=True)
        if kind == "max":
            return self.data.masked_fill(~mask, -torch.inf).amax(1).where(lens > 0, 0)
        total = (self.data * mask).sum(1)
        return total if kind == "sum" else total / lens.clamp(min=1)


class PaddedAdaTape(ElasticModule):
    """The padded, masked counterpart of an elastic model, on the same parameters.

    Pruning, adapters and parametrisations act as in the elastic model, and so do hooks on linear
    modules and norms. Other hooks on the elastic model, its encoder, layers, attentions and readers
    do not run, since these take elastic batches and are not called here.

    Args:
        model: the elastic model, whose parameters become parameters of this module too.

    Raises:
        TypeError: the model is no module, or lacks what an AdaTape has.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> padded = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5).padded()
        >>> padded(torch.zeros(2, 3, 8, 8)).logits.shape
        torch.Size([2, 5])
    """

    def __init__(self, model: ElasticModel):
        check_kind("model", model, nn.Module)
        for name in ("encoder", "head", "bank_repeats_rows", "config", "embed", "loss"):
            if not hasattr(model, name):
                raise TypeError(
                    f"model: expected an elastic model, which has {name}, "
                    f"got {type(model).__name__} without it"
                )
        super().__init__()
        self.model = model
        self.select = reference.tape_select if model.bank_repeats_rows else batched_topk_select

    def forward(
        self,
        inputs: ModelInputs,
        *,
        halt_threshold: float | Tensor | None = None,
        num_tape_tokens: int | None = None,
    ) -> AdaTapeOutput:
        """Return what the elastic model returns, computed over every position that could exist.

        Args:
            inputs: as for the elastic model; examples of many sizes are padded to the longest.
            halt_threshold, num_tape_tokens: as for the elastic model; every tape is padded to
                num_tape_tokens.

        Raises:
            ValueError: the inputs do not fit the model.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> padded = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5).padded()
            >>> padded(torch.zeros(2, 3, 8, 8)).tape_lens.dtype
            torch.int32
        """
        model = self.model
        make_weights(cast(nn.Module, model))
        make_weights(model.encoder)
        bank_lens: Tensor | None = None
        if isinstance(inputs, Tensor):
            tokens, bank = model.embed(inputs)
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        else:
            elastic, bank, bank_lens = model.embed_elastic(inputs)
            tokens, mask = elastic.to_padded() if elastic.batch else no_examples(elastic)
        x = _PaddedTokens(tokens, mask, tokens.shape[1])
        reads = []
        for layer, reader in model.encoder.stages():
            if reader is not None:
                make_weights(reader)
                budget = reader.budget(halt_threshold, num_tape_tokens)
                x, selection = self._read(reader, x, bank, bank_lens, budget)
                reads.append(selection)
            x = replace(x, data=encode_padded(layer, x.data, x.mask, x.num_inputs))
        x = _PaddedTokens(model.encoder.norm(x.data), x.mask, x.num_inputs)
        logits = model.head(x.pool(model.config.pooling, model.config.num_registers))
        tape_lens = x.mask[:, x.num_inputs :].sum(1, dtype=torch.int32)
        return AdaTapeOutput(logits, tape_lens, stack_ponder(tuple(reads), logits), tuple(reads))

    if TYPE_CHECKING:
        __call__ = forward

    def loss(
        self,
        output: AdaTapeOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        kind: LossKind = "softmax",
    ) -> Tensor:
        """Return the loss of the elastic model, as `AdaTape.loss` defines it.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> padded = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5).padded()
            >>> padded.loss(padded(torch.zeros(2, 3, 8, 8)), torch.tensor([0, 4])).shape
            torch.Size([])
        """
        return self.model.loss(output, labels, label_smoothing=label_smoothing, kind=kind)

    def _read(
        self,
        reader: TapeReader,
        x: _PaddedTokens,
        bank: Tensor | None,
        bank_lens: Tensor | None,
        budget: ReadBudget,
    ) -> tuple[_PaddedTokens, TapeSelection]:
        pooled = x.pool("token" if reader.query == "token" else "mean")
        values, query, read_mask = reader.normalised(bank, pooled)
        if bank_lens is not None:
            entries = torch.arange(values.shape[-2], device=values.device)
            absent = entries >= bank_lens.unsqueeze(1)
            read_mask = absent if read_mask is None else read_mask | absent
        selection = self.select(
            query[:, : reader.key_dim],
            values[..., : reader.key_dim],
            **budget._asdict(),
            topk=reader.topk,
            average_query=reader.average_query,
            loss_type=reader.loss_type,
            read_mask=read_mask,
        )
        rows = _rows(values, selection.indices.clamp(min=0).long())
        tape = (selection.weights.unsqueeze(2) @ rows).squeeze(2).to(x.data.dtype)
        if reader.tape_mlp is not None:
            tape = reader.tape_mlp(tape)
        positions = torch.arange(budget.num_tape_tokens, device=tape.device)
        exists = positions < selection.counts.unsqueeze(1)
        appended = _PaddedTokens(
            torch.cat([x.data, tape], 1), torch.cat([x.mask, exists], 1), x.num_inputs
        )
        return appended, selection


def batched_topk_select(
    query: Tensor,
    keys: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float | Tensor,
    average_query: bool,
    loss_type: str,
    read_mask: Tensor | None = None,
    in_order: bool = False,
) -> TapeSelection:
    """Select for the whole batch at once, by a matrix product and a `torch.topk` a tape token.

    Arguments and results are those of `ops.tape_select`, except that bank tokens of equal scores
    may be selected in any order. With `in_order` equal bank tokens have equal scores, and the lower
    index goes first among equals, as SPEC 3 wants it: by sums over rows and topk maxima.
    """
    batch, key_dim = query.shape
    bank_size = keys.shape[-2]
    read = query.new_zeros(batch, bank_size, dtype=torch.bool) if read_mask is None else read_mask
    halting, ponder = query.new_zeros(2, batch)
    counts = torch.zeros(batch, dtype=torch.int32, device=query.device)
    all_indices, all_weights = [], []
    for _ in range(min(num_tape_tokens, bank_size // topk)):
        reading = halting < halt_threshold
        if read_mask is not None:
            reading = reading & ((~read).sum(1) >= topk)
        if in_order:
            scores = (keys * query.unsqueeze(1)).sum(2)
        else:
            scores = query @ keys.T if keys.dim() == 2 else (keys @ query.unsqueeze(2)).squeeze(2)
        # The lowest finite number rather than -inf: an example that has halted goes on selecting,
        # which is masked below, and where its bank runs out the softmax of -inf alone is NaN.
        scores = scores.masked_fill(read, torch.finfo(scores.dtype).min)
        if in_order:
            best, indices = _first_largest(scores, topk)
        else:
            best, indices = scores.topk(topk)
        weights = torch.softmax(best / math.sqrt(key_dim), 1)
        cost = 1 - (weights.square().sum(1) if loss_type == "entropy" else weights.amax(1))
        ponder = ponder + cost * reading
        halting = halting + weights[:, 0].detach() * reading
        counts += reading
        merged = (weights.unsqueeze(1) @ _rows(keys, indices)).squeeze(1)
        query = (query + merged) / 2 if average_query else merged
        read = read.scatter(1, indices, True)
        all_indices.append(indices.masked_fill(~reading.unsqueeze(1), -1))
        all_weights.append(weights * reading.unsqueeze(1))
    unused = num_tape_tokens - len(all_indices)
    empty = query.new_zeros(batch, unused, topk)
    return TapeSelection(
        torch.cat([_stacked(all_indices, empty), empty.to(torch.int32) - 1], 1).to(torch.int32),
        torch.cat([_stacked(all_weights, empty), empty], 1),
        counts,
        ponder,
    )


def no_examples(x: ElasticBatch) -> tuple[Tensor, Tensor]:
    """Return the padded rows (0, max_inputs, dim) of a batch without examples, and their mask."""
    shape = (0, x.max_inputs)
    return x.data.new_empty(*shape, x.data.shape[1]), x.data.new_empty(shape, dtype=torch.bool)


def _first_largest(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their indices, the lower index first among equals."""
    left, found = scores, []
    for _ in range(topk):
        found.append(left.argmax(1, keepdim=True))  # the first of several maxima
        left = left.scatter(1, found[-1], -torch.inf)
    indices = torch.cat(found, 1)
    return scores.gather(1, indices), indices


def _stacked(parts: list[Tensor], empty: Tensor) -> Tensor:
    """Stack parts (batch, topk) to (batch, parts, topk), also where there are none."""
    return torch.stack(parts, 1) if parts else empty[:, :0]


def _rows(bank: Tensor, indices: Tensor) -> Tensor:
    """Return the bank's rows at indices (batch, ...) as (batch, ..., width)."""
    if bank.dim() == 2:
        return bank[indices]
    batch = torch.arange(bank.shape[0], device=bank.device)
    return bank[batch.view(-1, *[1] * (indices.dim() - 1)), indices]
