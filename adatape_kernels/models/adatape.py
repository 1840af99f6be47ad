"""The AdaTape model, from tokens to logits and loss; what it is fed is left to its subclasses."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind, check_tensor
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers import ElasticEncoder, ElasticEncoderLayer, TapeReader
from adatape_kernels.models.config import AdaTapeConfig
from adatape_kernels.models.embedding import Embedded, ModelInputs
from adatape_kernels.models.head import NormedHead
from adatape_kernels.models.hub import HubModel
from adatape_kernels.models.output import AdaTapeOutput, stack_ponder
from adatape_kernels.models.padded import PaddedAdaTape
from adatape_kernels.models.value_checks import as_number
from adatape_kernels.offsets import can_be_seen

_NOT_COUNTED = -100


class AdaTape(HubModel, ABC):
    """An elastic encoder with a class token, a head and a loss; subclasses define `embed`.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no AdaTapeConfig.

    Source: SPEC 6 and 7.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> class Sentences(ak.models.AdaTape):
        ...     def embed(self, inputs):  # (batch, seqlen, dim) embeddings are their own bank
        ...         return self.with_class_token(inputs), inputs
        >>> model = Sentences(ak.models.AdaTapeConfig(
        ...     num_classes=3, dim=8, depth=2, num_heads=2, ffn_dim=16, topk=2
        ... ))
        >>> model(torch.randn(4, 20, 8)).logits.shape
        torch.Size([4, 3])
    """

    bank_repeats_rows = False
    """Whether rows of a bank may be equal; the padded model then breaks ties as SPEC 3 does."""

    def __init__(self, config: AdaTapeConfig):
        check_kind("config", config, AdaTapeConfig)
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
                    norm_eps=c.norm_eps,
                    activation=c.activation,
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
            norm_eps=c.norm_eps,
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.pooling == "token" else None
        self.registers: nn.Parameter | None = None
        if c.num_registers:
            self.registers = nn.Parameter(torch.empty(1, c.num_registers, c.dim))
            nn.init.normal_(self.registers, std=0.02)
        self.head = nn.Linear(c.dim, c.num_classes)
        if c.norm_after_pooling:
            self.encoder.norm = nn.Identity()
            self.head = NormedHead(c.dim, c.num_classes, c.norm_eps)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn the model's inputs into tokens and a bank.

        Returns:
            The input tokens (batch, seqlen, dim), and the bank (batch, bank_size, dim) or None
            where the readers have learnable ones.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
            >>> tokens, bank = model.embed(torch.zeros(2, 3, 8, 8))
            >>> tokens.shape, bank.shape  # 4 patches and the class token; 16 smaller patches
            (torch.Size([2, 5, 192]), torch.Size([2, 16, 192]))
        """

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """Put the class token and the registers before each example's tokens.

        Args:
            tokens: (batch, seqlen, dim).

        Returns:
            (batch, seqlen + 1 + num_registers, dim), or less by what the model does not have.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
            >>> model.with_class_token(torch.zeros(2, 4, 192)).shape
            torch.Size([2, 5, 192])
        """
        learned = [part for part in (self.class_token, self.registers) if part is not None]
        if not learned:
            return tokens
        return torch.cat([*(part.expand(tokens.shape[0], -1, -1) for part in learned), tokens], 1)

    def embed_elastic(self, inputs: ModelInputs) -> Embedded:
        """Turn the model's inputs into an elastic batch of tokens, a bank and the banks' lengths.

        Here the examples are those of `embed`, of one length. A subclass whose examples may have
        several lengths overrides it.

        Returns:
            The tokens, the bank as `embed` returns it, and how many leading tokens of each
            example's bank exist, (batch,) int32, or None where all do.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1)
            >>> images = [torch.zeros(3, 8, 8), torch.zeros(3, 4, 12)]
            >>> tokens, bank, bank_lens = model.embed_elastic(images)
            >>> tokens.input_lens.tolist(), bank_lens.tolist()
            ([5, 4], [16, 12])
        """
        tokens, bank = self.embed(cast(Tensor, inputs))
        return Embedded(ElasticBatch.from_padded(tokens), bank, None)

    def forward(self, inputs: ModelInputs, *, capacity: int | None = None) -> AdaTapeOutput:
        """Classify a batch.

        Args:
            inputs: what the subclass embeds, on the parameters' device and in their dtype.
            capacity: tape rows to reserve for each read, over the whole batch (capacity mode,
                which never synchronises); None computes exactly the rows that are read.

        Raises:
            ValueError: the inputs do not fit the model, or the capacity is too small.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> model(torch.zeros(2, 3, 8, 8)).logits.shape
            torch.Size([2, 5])
            >>> model(torch.zeros(2, 3, 8, 8), capacity=20).logits.shape
            torch.Size([2, 5])
        """
        tokens, bank, bank_lens = self.embed_elastic(inputs)
        x, reads = self.encoder(tokens, bank, bank_lens=bank_lens, capacity=capacity)
        logits = self.head(self._pool(x))
        return AdaTapeOutput(logits, x.tape_lens, stack_ponder(reads, logits), reads)

    if TYPE_CHECKING:
        __call__ = forward

    def _pool(self, x: ElasticBatch) -> Tensor:
        """Reduce each example's rows to what the head sees, (batch, dim), without registers."""
        pooling, hidden = self.config.pooling, self.config.num_registers
        if pooling == "token" or hidden == 0:
            return x.pool(pooling)
        first = torch.arange(hidden, device=x.data.device)
        rows = (x.cu_inputs[:-1].unsqueeze(1) + first).flatten()
        neutral = -torch.inf if pooling == "max" else 0.0
        pooled = x.with_data(x.data.index_fill(0, rows, neutral)).pool(pooling)
        seen = (x.lens - hidden).unsqueeze(1)
        if pooling == "mean":
            wide = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            pooled = (wide * x.lens.unsqueeze(1) / seen.clamp(min=1)).to(pooled.dtype)
        return pooled.where(seen > 0, 0)

    def loss(
        self, output: AdaTapeOutput, labels: Tensor, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the cross entropy plus ponder_weight · mean_i Σ_reads p_i, a scalar.

        Args:
            output: what the model returned for the batch.
            labels: (batch,) int64, 0 to num_classes - 1, or -100 where an example does not count;
                or (batch, num_classes), a probability of each class, of the logits' dtype.
            label_smoothing: the share of the target that is spread over all classes, 0 to 1.

        Raises:
            ValueError: label_smoothing is out of range, or the labels have another shape or dtype
                or, where they lie on the host, are none of the classes.
            TypeError: an argument is of another type altogether.

        Source: SPEC 7.

        Example:
            >>> import math, torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5, ponder_weight=0)
            >>> loss = model.loss(model(torch.zeros(2, 3, 8, 8)), torch.tensor([0, 4]))
            >>> math.isclose(loss.item(), math.log(5), rel_tol=1e-6)  # a new head guesses
            True
        """
        label_smoothing = as_number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
        check_kind("output", output, AdaTapeOutput)
        _check_labels(labels, output.logits)
        classification = F.cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
        return classification + self.config.ponder_weight * output.ponder.sum(1).mean()

    def padded(self) -> PaddedAdaTape:
        """Return the eager, padded and masked model on the same parameters.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> elastic, padded = model(images := torch.ones(2, 3, 8, 8)), model.padded()(images)
            >>> torch.allclose(elastic.logits, padded.logits, atol=1e-5)
            True
        """
        return PaddedAdaTape(self)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse what are no labels of these logits; values on the host alone, as they can be seen."""
    check_tensor("labels", labels)
    batch, num_classes = logits.shape
    if labels.dtype == logits.dtype and labels.shape == logits.shape:
        return  # a probability of each class
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ValueError(
            f"labels: expected torch.int64 ({batch},) or {logits.dtype} ({batch}, {num_classes}), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected a tensor on {logits.device}, got {labels.device}")
    if not can_be_seen(labels):
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != _NOT_COUNTED)]
    if len(wrong):
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {int(wrong[0])}")
