"""Models that do not read, in plain torch on dense tensors, where what has halted is masked."""

from typing import TYPE_CHECKING

from torch import Tensor

from adatape_kernels.arguments import check_kind
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting import Halting, HaltingState
from adatape_kernels.layers import ElasticEncoderLayer, ElasticModule
from adatape_kernels.layers.torch_modules import make_weights
from adatape_kernels.models.classifier import Classifier, Encoded
from adatape_kernels.models.cross_entropy import LossKind
from adatape_kernels.models.embedding import ModelInputs
from adatape_kernels.models.output import AdaTapeOutput
from adatape_kernels.models.padded_layer import encode_padded


class PaddedClassifier(ElasticModule):
    """The padded, masked counterpart of a model that does not read, on the same parameters.

    All rows of all examples pass every layer until everything has halted: what has halted weighs
    nothing and, where single rows leave the model's batch, is seen by no other row. Hooks act as in
    `PaddedAdaTape`.

    Args:
        model: the model, whose parameters become parameters of this module too.

    Raises:
        TypeError: the model is no such model.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=5)
        >>> model.padded()(torch.zeros(2, 3, 32, 32)).halted.steps.tolist()
        [4, 4]
    """

    def __init__(self, model: Classifier):
        check_kind("model", model, Classifier)
        super().__init__()
        self.model = model

    def forward(self, inputs: ModelInputs) -> AdaTapeOutput:
        """Return what the model returns, computed over every row.

        Args:
            inputs: as for the model; examples of many sizes are padded to the longest.

        Raises:
            ValueError: the inputs do not fit the model.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("transformer_tiny", depth=1)
            >>> model.padded()(torch.zeros(2, 40, 3)).logits.shape
            torch.Size([2, 2])
        """
        model = self.model
        make_weights(model)
        make_weights(model.encoder)
        encoded = self._encoded(model.embed_elastic(inputs).tokens)
        return model.output_of(encoded, model.forward_head(encoded.batch))

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
        """Return the loss of the model, as `Classifier.loss` defines it.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> padded = ak.models.create_model("transformer_tiny", depth=1).padded()
            >>> padded.loss(padded(torch.zeros(2, 40, 3)), torch.tensor([0, 1])).shape
            torch.Size([])
        """
        return self.model.loss(output, labels, label_smoothing=label_smoothing, kind=kind)

    def _encoded(self, tokens: ElasticBatch) -> Encoded:
        return self.model.encode_rows(tokens, self._apply_layer, masked=True)

    def _apply_layer(
        self, layer: ElasticEncoderLayer, x: ElasticBatch, state: HaltingState | None
    ) -> ElasticBatch:
        data, exists = padded_rows(x, x.data)
        keys, rule = exists, getattr(self.model.encoder, "halting", None)
        if state is not None and isinstance(rule, Halting) and rule.leave == "row":
            running, _ = padded_rows(x, state.rows_that_run.unsqueeze(1))
            data = data.where(running, 0)
            keys = running.squeeze(2)
            # An example that has halted altogether sees all of its rows, as a softmax over no score
            # at all is NaN; nothing is made of them any more.
            halted = ~keys.any(1, keepdim=True)
            keys = keys | (halted if exists is None else exists & halted)
        y = encode_padded(layer, data, keys, data.shape[1])
        return x.with_data(y.flatten(0, 1) if exists is None else y[exists])


def padded_rows(x: ElasticBatch, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return values of the input rows of a batch, padded, and the mask of those that exist.

    Args:
        x: a batch without tape rows.
        rows: (rows, any), bool too.

    Returns:
        (batch, most rows, any), 0 or False where there is no row, and (batch, most rows) bool, None
        where all exist.
    """
    if x.min_inputs == x.max_inputs:
        return rows.unflatten(0, (x.batch, x.max_inputs)), None
    return x.with_data(rows).to_padded(x.max_inputs)
