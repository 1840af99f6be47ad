"""A classifier, from tokens to logits and loss; what it is fed is left to its subclasses."""

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adatape_kernels.arguments import check_flag, check_kind
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting import HaltingState
from adatape_kernels.layers import ElasticEncoder, ElasticEncoderLayer
from adatape_kernels.layers.halting_encoder import ApplyLayer, applied_as_rows_leave
from adatape_kernels.models.cross_entropy import LossKind, classification_loss
from adatape_kernels.models.embedding import Embedded, ModelInputs
from adatape_kernels.models.encoder_config import EncoderConfig
from adatape_kernels.models.head import NormedHead, RepresentedHead, new_head
from adatape_kernels.models.output import AdaTapeOutput, HaltedUnits, stack_ponder
from adatape_kernels.models.timm_methods import TimmMethods
from adatape_kernels.op_types import TapeSelection


class Encoded(NamedTuple):
    """What the encoder of a model made of a batch.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
        >>> encoded = model.encode(torch.zeros(2, 3, 32, 32))
        >>> encoded.batch.data.shape, encoded.reads, encoded.halted
        (torch.Size([10, 192]), (), None)
    """

    batch: ElasticBatch
    """The encoded rows of each example."""
    reads: tuple[TapeSelection, ...] = ()
    """What each read selected."""
    ponder: Tensor | None = None
    """(batch, 1), N + R of each example, where something halts."""
    halted: HaltedUnits | None = None
    """When examples or rows halted, where something halts."""


class Classifier(TimmMethods, ABC):
    """An encoder with a class token, a head and a loss; subclasses define `embed`.

    Without reads and halting it is a plain Transformer. `AdaTape` reads, and the models that
    `adatape_kernels.models` has beside it halt.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no EncoderConfig.

    Source: SPEC 6 and 7.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> class Embeddings(ak.models.Classifier):
        ...     def embed(self, inputs):  # (batch, seqlen, dim)
        ...         return self.with_class_token(inputs), None
        >>> model = Embeddings(ak.models.EncoderConfig(
        ...     num_classes=3, dim=8, depth=2, num_heads=2, ffn_dim=16
        ... ))
        >>> model(torch.randn(4, 20, 8)).logits.shape
        torch.Size([4, 3])
    """

    def __init__(self, config: EncoderConfig):
        check_kind("config", config, EncoderConfig)
        super().__init__()
        self.config: EncoderConfig = config
        c = config
        self.num_classes = c.num_classes
        self.encoder = self._new_encoder()
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.has_class_token else None
        self.registers: nn.Parameter | None = None
        if c.num_registers:
            self.registers = nn.Parameter(torch.empty(1, c.num_registers, c.dim))
            nn.init.normal_(self.registers, std=0.02)
        self.head = new_head(c)
        if c.norm_after_pooling:
            self.encoder.norm = nn.Identity()

    def _new_encoder(self) -> nn.Module:
        """Return the encoder, new; its layers are `layers`, and its last LayerNorm is `norm`."""
        c = self.config
        layers = (self._new_layer(layer) for layer in range(c.depth))
        return ElasticEncoder(layers, c.dim, norm_eps=c.norm_eps)

    def _new_layer(self, layer: int, tape_ffn_dim: int = 0) -> ElasticEncoderLayer:
        c = self.config
        return ElasticEncoderLayer(
            c.dim,
            c.num_heads,
            c.ffn_dim,
            tape_ffn_dim,
            dropout=c.dropout,
            attention_dropout=c.attention_dropout,
            stochastic_depth=c.stochastic_depth * layer / max(1, c.depth - 1),
            norm_eps=c.norm_eps,
            activation=c.activation,
        )

    @abstractmethod
    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn the model's inputs into tokens and a bank.

        Returns:
            The input tokens (batch, seqlen, dim), and the bank (batch, bank_size, dim), or None
            where nothing is read, or only banks of parameters.

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

    def forward(self, inputs: ModelInputs) -> AdaTapeOutput:
        """Classify a batch.

        Args:
            inputs: what the subclass embeds, on the parameters' device and in their dtype.

        Raises:
            ValueError: the inputs do not fit the model.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=6)
            >>> output = model(torch.zeros(2, 3, 32, 32))
            >>> output.logits.shape, output.halted.steps.tolist()
            (torch.Size([2, 1000]), [4, 4])
        """
        encoded = self.encode(inputs)
        return self.output_of(encoded, self.forward_head(encoded.batch))

    if TYPE_CHECKING:
        __call__ = forward

    def encode(self, inputs: ModelInputs) -> Encoded:
        """Embed and encode a batch.

        Args:
            inputs: as for `forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> model.encode(torch.zeros(2, 3, 32, 32)).batch.lens.tolist()
            [5, 5]
        """
        tokens, encoder = self.embed_elastic(inputs).tokens, self.encoder
        if isinstance(encoder, ElasticEncoder):
            apply = self._apply_layer if self._checkpoints else None
            return Encoded(*encoder(tokens, apply=apply))
        return self.encode_rows(tokens, self._apply_layer)

    def encode_rows(
        self, tokens: ElasticBatch, apply: ApplyLayer, *, masked: bool = False
    ) -> Encoded:
        """Encode embedded rows, applying the layers in a way of the caller's own.

        Args:
            tokens: what `embed_elastic` returns.
            apply: how a layer is applied to a batch.
            masked: whether what halts stays in the batch, and `apply` masks it.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> tokens = model.embed_elastic(torch.zeros(2, 3, 32, 32)).tokens
            >>> model.encode_rows(tokens, lambda layer, rows, state: layer(rows)).batch.batch
            2
        """
        x, encoder = tokens, cast(ElasticEncoder, self.encoder)
        for layer, _ in encoder.stages():
            x = apply(layer, x, None)
        return Encoded(x.with_data(encoder.norm(x.data)))

    @property
    def _checkpoints(self) -> bool:
        return self.grad_checkpointing and self.training

    def _apply_layer(
        self, layer: ElasticEncoderLayer, x: ElasticBatch, state: HaltingState | None = None
    ) -> ElasticBatch:
        """Apply a layer; in training once more in the backward pass, where this is asked for."""
        again = functools.partial(checkpoint, layer, use_reentrant=False)
        return applied_as_rows_leave(layer, again if self._checkpoints else layer, x, state)

    def output_of(self, encoded: Encoded, logits: Tensor) -> AdaTapeOutput:
        """Return a batch's output.

        Args:
            encoded: what `encode` returned.
            logits: what the head made of it.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> encoded = model.encode(torch.zeros(2, 3, 32, 32))
            >>> len(model.output_of(encoded, model.forward_head(encoded.batch)))
            2
        """
        x, reads, ponder, halted = encoded
        ponder = stack_ponder(reads, logits) if ponder is None else ponder
        return AdaTapeOutput(logits, x.tape_lens, ponder, reads, halted)

    def forward_features(self, inputs: ModelInputs) -> ElasticBatch:
        """Return the encoded rows of a batch, an `ElasticBatch`.

        `to_padded` makes (batch, longest, num_features) and a mask of it.

        Args:
            inputs: as for `forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> model.forward_features(torch.zeros(2, 3, 32, 32)).data.shape
            torch.Size([10, 192])
        """
        return self.encode(inputs).batch

    def forward_head(self, x: ElasticBatch, pre_logits: bool = False) -> Tensor:
        """Return logits, or what the head's linear layer sees, of encoded rows.

        Args:
            x: what `forward_features` returned.
            pre_logits: whether to leave the linear layer out.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> features = model.forward_features(torch.zeros(2, 3, 32, 32))
            >>> model.forward_head(features, pre_logits=True).shape
            torch.Size([2, 192])
        """
        check_kind("x", x, ElasticBatch)
        check_flag("pre_logits", pre_logits)
        return self._classify(self._pool(x), pre_logits=pre_logits)

    def _classify(
        self, pooled: Tensor, *, pre_logits: bool = False, drop_rate: float = 0.0
    ) -> Tensor:
        """Return logits of pooled rows, or what the linear layer sees; dropout stands before it."""
        head = self.head
        if not drop_rate and not pre_logits:
            return head(pooled)
        prepared = pooled
        if self.num_classes == 0:  # `head` is what is left of it without classes
            prepared = head(pooled)
        elif isinstance(head, NormedHead | RepresentedHead):
            prepared = head.prepared(pooled)
        prepared = F.dropout(prepared, drop_rate, self.training)
        if pre_logits or self.num_classes == 0:
            return prepared
        if isinstance(head, NormedHead | RepresentedHead):
            return F.linear(prepared, head.weight, head.bias)
        return head(prepared)

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
        self,
        output: AdaTapeOutput,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        kind: LossKind = "softmax",
    ) -> Tensor:
        """Return the cross entropy plus what the model charges for its computation, a scalar.

        A model with reads or halting adds ponder_weight · mean_i Σ ponder of example i.

        Args:
            output: what the model returned for the batch.
            labels: (batch,) int64, 0 to num_classes - 1, or -100 where an example does not count;
                or (batch, num_classes), a probability of each class, of the logits' dtype.
            label_smoothing: the share of the target that is spread over all classes, 0 to 1.
            kind: of the cross entropy, that of all classes, "softmax", or of each one, "sigmoid".

        Raises:
            ValueError: label_smoothing is out of range, the kind is unknown, or the labels have
                another shape or dtype or, where they lie on the host, are none of the classes.
            TypeError: an argument is of another type altogether.

        Source: SPEC 7, 11 and 12.

        Example:
            >>> import math, torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5, ponder_weight=0)
            >>> loss = model.loss(model(torch.zeros(2, 3, 8, 8)), torch.tensor([0, 4]))
            >>> math.isclose(loss.item(), math.log(5), rel_tol=1e-6)  # a new head guesses
            True
        """
        check_kind("output", output, AdaTapeOutput)
        classification = classification_loss(output.logits, labels, label_smoothing, kind)
        charge = self.charge(output)
        return classification if charge is None else classification + charge

    def charge(self, output: AdaTapeOutput) -> Tensor | None:
        """Return what the loss adds to the cross entropy, a scalar, or None for nothing.

        Args:
            output: what the model returned for the batch.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=6)
            >>> round(model.charge(model(torch.zeros(2, 3, 32, 32))).item(), 4)  # (4 + 0.193) / 100
            0.0419
        """
        check_kind("output", output, AdaTapeOutput)
        weight = getattr(self.config, "ponder_weight", None)
        if weight is None:
            return None
        return weight * output.ponder.sum(1).sum() / max(1, len(output.ponder))  # 0 of no examples

    def extra_repr(self) -> str:
        """Return the sizes of the model and what it reads by, as a printed model shows them.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).extra_repr()
            'depth=1, dim=192, num_heads=3, num_classes=1000, pooling=token'
        """
        c = self.config
        sizes = (
            f"depth={c.depth}, dim={c.dim}, num_heads={c.num_heads}, num_classes={c.num_classes}"
        )
        if c.pooling == "token" and not c.class_token:
            sizes = f"{sizes}, class_token=False"
        return f"{sizes}, pooling={c.pooling}{self._choices_in_words()}"

    def _choices_in_words(self) -> str:
        return ""
