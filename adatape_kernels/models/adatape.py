"""The AdaTape model, from tokens to logits and loss; what it is fed is left to its subclasses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.elastic import ElasticBatch, Pooling
from adatape_kernels.layers import ElasticEncoder, ElasticEncoderLayer, QueryType, TapeReader
from adatape_kernels.reference import LossType, TapeSelection

if TYPE_CHECKING:
    from adatape_kernels.models.padded import PaddedAdaTape


@dataclass(frozen=True)
class AdaTapeConfig:
    """What every AdaTape model is made of; SPEC 1 to 7 define the terms.

    Raises:
        ValueError: a value is out of range, or values contradict one another.
    """

    num_classes: int
    dim: int
    depth: int
    num_heads: int
    ffn_dim: int
    tape_ffn_dim: int = 0
    """Hidden width of the tape rows' own feed-forward; 0 shares the input rows'."""
    bank: Literal["input", "learn"] = "input"
    bank_size: int = 10_000
    """Tokens of a learnable bank."""
    num_tape_tokens: int = 10
    topk: int = 5
    halt_threshold: float = 2.0
    key_split: int = 1
    average_query: bool = True
    loss_type: LossType = "entropy"
    query: QueryType = "token"
    read_layers: tuple[int, ...] = (0,)
    tape_mlp_dim: int = 0
    pooling: Pooling = "token"
    """What the head sees; with "token" the model has a class token, otherwise none."""
    ponder_weight: float = 0.01
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    query_noise: float = 0.0
    bank_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check what the modules cannot see."""
        if self.bank not in ("input", "learn"):
            raise ValueError(f"bank: expected 'input' or 'learn', got {self.bank!r}")
        if self.pooling not in ("token", "mean", "max", "sum"):
            raise ValueError(f"pooling: expected token, mean, max or sum, got {self.pooling!r}")
        if self.query == "token" and self.pooling != "token":
            raise ValueError(
                f"query: expected 'gap' with pooling {self.pooling!r}, which has no class token, "
                "got 'token'"
            )
        if len(set(self.read_layers)) != len(self.read_layers):
            raise ValueError(f"read_layers: expected distinct layers, got {self.read_layers}")
        for name in ("dropout", "attention_dropout", "stochastic_depth", "bank_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 to below 1, got {getattr(self, name)}")


@dataclass
class AdaTapeOutput:
    """What a model returns."""

    logits: Tensor
    """(batch, num_classes)."""
    tape_lens: Tensor
    """(batch,) int32 tape tokens of each example."""
    ponder: Tensor
    """(batch, reads) ponder loss of each read, in the order of the layers."""
    reads: tuple[TapeSelection, ...]
    """What each read selected."""


class AdaTape(nn.Module, ABC):
    """An elastic encoder with a class token, a head and a loss; subclasses define `embed`."""

    # Equal bank rows tie exactly, and the padded model must then order them as the SPEC does.
    bank_repeats_rows = False

    def __init__(self, config: AdaTapeConfig):
        super().__init__()
        self.config = c = config
        self.encoder = ElasticEncoder(
            (
                ElasticEncoderLayer(
                    c.dim,
                    c.num_heads,
                    c.ffn_dim,
                    c.tape_ffn_dim if c.read_layers and layer >= min(c.read_layers) else 0,
                    dropout=c.dropout,
                    attention_dropout=c.attention_dropout,
                    stochastic_depth=c.stochastic_depth * layer / max(1, c.depth - 1),
                )
                for layer in range(c.depth)
            ),
            c.dim,
            {
                layer: TapeReader(
                    c.dim,
                    num_tape_tokens=c.num_tape_tokens,
                    topk=c.topk,
                    halt_threshold=c.halt_threshold,
                    bank_size=c.bank_size if c.bank == "learn" else 0,
                    key_split=c.key_split,
                    query=c.query,
                    average_query=c.average_query,
                    loss_type=c.loss_type,
                    tape_mlp_dim=c.tape_mlp_dim,
                    query_noise=c.query_noise,
                    bank_dropout=c.bank_dropout,
                )
                for layer in sorted(c.read_layers)
            },
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.pooling == "token" else None
        self.head = nn.Linear(c.dim, c.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens (batch, seqlen, dim) and the bank (batch, bank_size, dim), if any."""

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """Put the class token, if the model has one, before tokens (batch, seqlen, dim)."""
        if self.class_token is None:
            return tokens
        return torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)

    def forward(self, inputs: Tensor, *, capacity: int | None = None) -> AdaTapeOutput:
        """Run the model.

        Args:
            inputs: what the subclass embeds.
            capacity: tape rows to reserve for each read (capacity mode, which never
                synchronises); None computes exactly the rows that are read.

        Raises:
            ValueError: the inputs do not fit the model, or the capacity is too small.
        """
        tokens, bank = self.embed(inputs)
        x, reads = self.encoder(ElasticBatch.from_padded(tokens), bank, capacity=capacity)
        logits = self.head(x.pool(self.config.pooling))
        return AdaTapeOutput(logits, x.tape_lens, stack_ponder(reads, logits), reads)

    def loss(
        self, output: AdaTapeOutput, labels: Tensor, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the cross entropy plus ponder_weight · mean_i Σ_reads p_i (SPEC 7).

        `labels` are (batch,) int64.
        """
        classification = F.cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
        return classification + self.config.ponder_weight * output.ponder.sum(1).mean()

    def padded(self) -> "PaddedAdaTape":
        """Return the eager, padded and masked model on the same parameters."""
        from adatape_kernels.models.padded import PaddedAdaTape

        return PaddedAdaTape(self)


def stack_ponder(reads: tuple[TapeSelection, ...], logits: Tensor) -> Tensor:
    """Return the ponder losses (batch, reads), also when there is no read."""
    if not reads:
        return logits.new_zeros(logits.shape[0], 0)
    return torch.stack([read.ponder for read in reads], 1)
