"""The Transformer encoder over elastic batches: layers, with reads in between (SPEC 6)."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from adatape_kernels.arguments import check_int, check_kind, check_number, shown
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.conversion import differences_of_encoder, refuse_unknown
from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.encoder_layer import ElasticEncoderLayer, continues_sums
from adatape_kernels.layers.layer_checks import check_size
from adatape_kernels.layers.open_sum import OpenSum
from adatape_kernels.layers.reader import TapeReader, given_limits
from adatape_kernels.layers.recomputed_bank import RecomputedBank
from adatape_kernels.layers.row_kinds import Rows, as_batch, in_kind
from adatape_kernels.layers.spare_rows import (
    has_one_length,
    keeps_code_by_rows,
    with_spare_rows,
    without_spare_rows,
)
from adatape_kernels.layers.torch_modules import NORM_EPS, is_plain
from adatape_kernels.op_types import TapeSelection


class ElasticEncoder(ElasticModule):
    """A stack of encoder layers, some of which are preceded by a read, and a final LayerNorm.

    Args:
        layers: the layers, in order.
        dim: width of a token.
        readers: readers by the index of the layer that they run before.
        norm_eps: epsilon of the final LayerNorm.
        row_multiple: if more than 1, batches are given unused rows up to a multiple of it: see
            `ElasticBatch.round_rows`. It is an attribute that may be set later.

    Raises:
        ValueError: a reader's layer does not exist, dim or row_multiple is below 1, or norm_eps is
            negative.
        TypeError: an argument is of another type altogether.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(3)]
        >>> reader = ak.layers.TapeReader(8, num_tape_tokens=2, topk=3, halt_threshold=9.0)
        >>> encoder = ak.layers.ElasticEncoder(layers, 8, readers={1: reader})
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 4, 8))
        >>> y, reads = encoder(x, bank=torch.randn(2, 30, 8))
        >>> y.lens.tolist(), len(reads)
        ([6, 6], 1)
    """

    def __init__(
        self,
        layers: Iterable[ElasticEncoderLayer],
        dim: int,
        readers: Mapping[int, TapeReader] | None = None,
        *,
        norm_eps: float = NORM_EPS,
        row_multiple: int = 1,
    ):
        super().__init__()
        dim = check_size("dim", dim)
        check_number("norm_eps", norm_eps, 0)
        self.row_multiple = check_size("row_multiple", row_multiple)
        try:
            self.layers = nn.ModuleList([*layers])
        except TypeError:
            raise TypeError(f"layers: expected modules, got {shown(layers)}") from None
        readers = {} if readers is None else readers
        if not isinstance(readers, Mapping):
            raise TypeError(f"readers: expected readers by layer, got {type(readers).__name__}")
        for layer, reader in readers.items():
            check_int("readers", layer, None)
            if not 0 <= layer < len(self.layers):
                raise ValueError(
                    f"readers: expected layers from 0 to {len(self.layers) - 1}, got {layer}"
                )
            check_kind("readers", reader, nn.Module)
        self.readers = nn.ModuleDict({str(layer): reader for layer, reader in readers.items()})
        self.dim = dim
        self.norm: nn.Module = nn.LayerNorm(dim, norm_eps)

    @classmethod
    def from_torch(
        cls,
        encoder: nn.TransformerEncoder,
        tape_ffn_dim: int = 0,
        readers: Mapping[int, TapeReader] | None = None,
        *,
        stochastic_depth: float = 0.0,
        row_multiple: int = 1,
    ) -> "ElasticEncoder":
        """Make an encoder that computes what torch's does while nothing is read, on copies.

        Each layer is converted by `ElasticEncoderLayer.from_torch`. Without a final norm in torch's
        encoder there is none here. `batch_first`, `enable_nested_tensor` and `mask_check` play no
        part.

        Args:
            encoder: torch's encoder.
            tape_ffn_dim: hidden width of each layer's feed-forward for tape rows; 0 shares that of
                input rows.
            readers, row_multiple: as in the constructor.
            stochastic_depth: the rate of every layer.

        Raises:
            ValueError: the encoder or one of its layers has something that ours does not have; all
                of it is named.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
            >>> theirs = torch.nn.TransformerEncoder(layer, 3, torch.nn.LayerNorm(8)).eval()
            >>> ours, x = ak.layers.ElasticEncoder.from_torch(theirs), torch.randn(3, 5, 8)
            >>> y, _ = ours(ak.ElasticBatch.from_padded(x))
            >>> torch.allclose(y.to_padded()[0], theirs(x), atol=1e-5)
            True
        """
        refuse_unknown("encoder", encoder, differences_of_encoder(encoder))
        layers = [
            ElasticEncoderLayer.from_torch(
                cast(nn.TransformerEncoderLayer, layer),
                tape_ffn_dim,
                stochastic_depth=stochastic_depth,
            )
            for layer in encoder.layers
        ]
        dim = layers[0].self_attn.out_proj.out_features
        ours = cls(layers, dim, readers, row_multiple=row_multiple)
        ours.norm = nn.Identity() if encoder.norm is None else copy.deepcopy(encoder.norm)
        ours.training = encoder.training
        return ours

    def stages(self) -> Iterator[tuple[ElasticEncoderLayer, TapeReader | None]]:
        """Yield each layer with the reader that runs before it, or with None.

        Example:
            >>> import adatape_kernels as ak
            >>> layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(3)]
            >>> reader = ak.layers.TapeReader(8, num_tape_tokens=2, topk=3, halt_threshold=9.0)
            >>> encoder = ak.layers.ElasticEncoder(layers, 8, readers={1: reader})
            >>> [reader is not None for _, reader in encoder.stages()]
            [False, True, False]
        """
        for index, layer in enumerate(self.layers):
            name = str(index)
            reader = self.readers[name] if name in self.readers else None
            yield cast(ElasticEncoderLayer, layer), cast(TapeReader | None, reader)

    def forward(
        self,
        x: Rows,
        bank: Tensor | RecomputedBank | None = None,
        *,
        bank_lens: Tensor | None = None,
        capacity: int | None = None,
        halt_threshold: float | Tensor | None = None,
        num_tape_tokens: int | None = None,
        apply: Callable[[ElasticEncoderLayer, ElasticBatch], ElasticBatch] | None = None,
    ) -> tuple[Rows, tuple[TapeSelection, ...]]:
        """Encode a batch.

        In bfloat16 on a CPU a ragged batch is computed with some spare rows more, up to a 64th of a
        large one, so that torch meets few numbers of rows. That is left out where a layer is
        another class, or has hooks or parts that are not torch's own.

        Args:
            x: an ElasticBatch, a Tensor (batch, seqlen, dim), a pair (Tensor, mask) or a jagged
                Tensor, of the parameters' dtype; a mask is True where a row is valid, which is the
                opposite of torch's src_key_padding_mask.
            bank: (batch, bank_size, dim) or (bank_size, dim), for the readers without a learnable
                bank of their own.
            bank_lens: (batch,) integers, how many leading tokens of each example's bank are
                valid; None when all are.
            capacity: tape rows that each read reserves for the whole batch (capacity mode); None
                computes exactly the rows that are read.
            halt_threshold, num_tape_tokens: in the place of each reader's own; None leaves them.
            apply: how a layer is applied to a batch; None to call it.

        Returns:
            The encoded rows in the kind of x, and what each read selected, in the order of the
            layers. Without readers, the shape and mask of x are kept. With readers, a pair is what
            `ElasticBatch.to_padded` gives, and a plain tensor is the first of that pair: for each
            example its input rows, its tape rows (as many as the reads' counts say), and zeros.
            With a capacity both are padded to the most rows that an example can have.

        Raises:
            TypeError: x is none of these.
            ValueError: a mask does not match, or as in `TapeReader.forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(2)]
            >>> encoder = ak.layers.ElasticEncoder(layers, 8)
            >>> y, reads = encoder(ak.ElasticBatch.from_padded(torch.randn(2, 4, 8)))
            >>> y.data.shape, reads
            (torch.Size([8, 8]), ())
            >>> mask = torch.tensor([[True, True, True], [True, False, False]])
            >>> (padded, mask), reads = encoder((torch.randn(2, 3, 8), mask))
            >>> padded.shape, padded[1, 1:].count_nonzero().item()
            (torch.Size([2, 3, 8]), 0)
        """
        given = as_batch(x, self.dim)
        batch = given.round_rows(self.row_multiple) if self.row_multiple > 1 else given
        options = {**given_limits(halt_threshold, num_tape_tokens), "capacity": capacity}
        reads, rows, spare = [], batch.data.shape[0], self._computes_spare_rows(batch)
        x_sum = OpenSum(batch, None)
        for layer, reader in self.stages():
            if reader is not None:
                batch = without_spare_rows(x_sum.closed(), rows)
                batch, selection = reader(batch, bank, bank_lens=bank_lens, **options)
                reads.append(selection)
                rows, x_sum = batch.data.shape[0], OpenSum(batch, None)
            if spare and x_sum.branch is None and not has_one_length(x_sum.batch):
                x_sum = OpenSum(with_spare_rows(x_sum.batch), None)
            if apply is None and continues_sums(layer):
                x_sum = cast(OpenSum, layer(cast(Rows, x_sum)))
            else:
                batch = x_sum.closed()
                x_sum = OpenSum(layer(batch) if apply is None else apply(layer, batch), None)
        if is_plain(self.norm, nn.LayerNorm):
            batch, normed = x_sum.normed(cast(nn.LayerNorm, self.norm))
            y = without_spare_rows(batch.with_data(normed), rows)
        else:
            batch = without_spare_rows(x_sum.closed(), rows)
            y = batch.with_data(self.norm(batch.data))
        appended, static = len(reads) > 0, capacity is not None
        return in_kind(y, x, given, appended=appended, static=static), tuple(reads)

    if TYPE_CHECKING:
        __call__ = forward

    def _computes_spare_rows(self, batch: ElasticBatch) -> bool:
        return keeps_code_by_rows(batch.data) and all(
            isinstance(layer, ElasticEncoderLayer) and layer.takes_spare_rows()
            for layer in self.layers
        )
