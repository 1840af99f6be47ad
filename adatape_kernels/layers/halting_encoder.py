"""Encoders whose examples or rows halt, and leave the batch: universal ones and A-ViT's."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_flag, check_kind, check_number
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting import Halting, HaltingState
from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.encoder_layer import ElasticEncoderLayer
from adatape_kernels.layers.halting_units import FeatureGate, MeanHaltingUnit
from adatape_kernels.layers.layer_checks import check_size
from adatape_kernels.layers.spare_rows import computed_with_spare_rows, keeps_code_by_rows
from adatape_kernels.layers.torch_modules import NORM_EPS

ApplyLayer = Callable[[ElasticEncoderLayer, ElasticBatch, HaltingState | None], ElasticBatch]
"""How a layer is applied to a batch; where halted rows stay in it, the state says which."""


def apply_layer(
    layer: ElasticEncoderLayer, batch: ElasticBatch, state: HaltingState | None
) -> ElasticBatch:
    """Apply a layer to all rows of a batch, each of which all others of its example see."""
    return applied_as_rows_leave(layer, layer, batch, state)


def applied_as_rows_leave(
    layer: ElasticEncoderLayer,
    call: Callable[[ElasticBatch], ElasticBatch],
    batch: ElasticBatch,
    state: HaltingState | None,
) -> ElasticBatch:
    """Apply a layer to a batch whose number of rows falls from step to step, if it does.

    In bfloat16 on a CPU that is done with spare rows, so that torch meets few numbers of rows.

    Args:
        layer: the layer.
        call: what applies it, the layer itself or a checkpoint of it.
        batch: the rows that run.
        state: as `ApplyLayer` takes it.
    """
    leaves = state is not None and not (state.static or state.masked)
    if leaves and keeps_code_by_rows(batch.data) and layer.takes_spare_rows():
        return computed_with_spare_rows(call, batch)
    return call(batch)


class Halted(NamedTuple):
    """What an encoder returns whose examples or rows halt.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layer = ak.layers.ElasticEncoderLayer(8, 2, 16)
        >>> encoder = ak.layers.UniversalEncoder([layer], 8, 6, ak.halting.Halting.act())
        >>> halted = encoder(ak.ElasticBatch.from_padded(torch.randn(2, 4, 8)))
        >>> halted.batch.data.shape, halted.state.rows_per_step
        (torch.Size([8, 8]), (8, 8, 8, 8))
    """

    batch: ElasticBatch
    """The encoded rows, all that the encoder was given."""
    state: HaltingState | None
    """The state after the last step, or None where nothing halts."""
    means: Tensor | None
    """(layers,) the mean halting probability of each layer, where the encoder has it."""


class UniversalEncoder(ElasticModule):
    """Steps of one or more layers, after each of which an example may halt (ACT).

    Args:
        layers: the layers; step n takes number n mod len(layers), so that one is shared by all
            steps, two take turns, and as many as steps are not shared at all.
        dim: width of a token.
        max_steps: most steps that an example takes.
        halting: the rule, or None to take all steps and return the last states.
        halting_bias_init: the bias of the halting unit at first.
        norm_eps: epsilon of the final LayerNorm.

    Raises:
        ValueError: there are no layers, or an argument is out of range.
        TypeError: an argument is of another type altogether.

    Source: SPEC 11.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layer = ak.layers.ElasticEncoderLayer(8, 2, 16)
        >>> encoder = ak.layers.UniversalEncoder([layer], 8, 6, ak.halting.Halting.act())
        >>> halted = encoder(ak.ElasticBatch.from_padded(torch.randn(2, 4, 8)))
        >>> halted.state.updates.tolist()  # at first each step adds sigmoid(-1) = 0.27
        [4, 4]
    """

    def __init__(
        self,
        layers: Iterable[ElasticEncoderLayer],
        dim: int,
        max_steps: int,
        halting: Halting | None = None,
        *,
        halting_bias_init: float = -1.0,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.layers = nn.ModuleList([*layers])
        if not self.layers:
            raise ValueError("layers: expected one or more, got none")
        check_number("norm_eps", norm_eps, 0)
        if halting is not None:
            check_kind("halting", halting, Halting)
        self.dim = check_size("dim", dim)
        self.max_steps = check_size("max_steps", max_steps)
        self.halting = halting
        self.unit = None if halting is None else MeanHaltingUnit(dim, halting_bias_init)
        self.norm = nn.LayerNorm(dim, norm_eps)

    def forward(
        self,
        x: ElasticBatch,
        *,
        apply: ApplyLayer = apply_layer,
        halting: Halting | None = None,
    ) -> Halted:
        """Encode a batch.

        Args:
            x: rows (rows, dim) of the parameters' dtype.
            apply: how a layer is applied to a batch.
            halting: a rule for this call in the place of the encoder's own.

        Raises:
            TypeError: x is no ElasticBatch, or halting no rule.
            ValueError: the rule does not fit, or a halting unit of another class returned something
                else than probabilities.

        Example:
            >>> import dataclasses, torch, adatape_kernels as ak
            >>> layer, rule = ak.layers.ElasticEncoderLayer(8, 2, 16), ak.halting.Halting.act()
            >>> encoder = ak.layers.UniversalEncoder([layer], 8, 6, rule)
            >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 4, 8))
            >>> sooner = dataclasses.replace(rule, threshold=0.5)
            >>> encoder(x, halting=sooner).state.updates.tolist()
            [2, 2]
        """
        check_kind("x", x, ElasticBatch)
        rule = _rule_of(self.halting, halting, apply)
        if rule is None or self.unit is None:
            for step in range(self.max_steps):
                x = apply(self._layer(step), x, None)
            return Halted(x.with_data(self.norm(x.data)), None, None)
        state = rule.start(x)
        for step in range(self.max_steps):
            if state.done:
                break
            probabilities = self.unit(state)
            data = apply(self._layer(step), state.batch, state).data
            last = step == self.max_steps - 1
            if type(self.unit) is not MeanHaltingUnit:
                rule.check_step(state, probabilities, data)
            state = rule.advance(state, probabilities, data, last=last)
        y = state.output
        return Halted(y.with_data(self.norm(y.data)), state, None)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """Return the number of steps and when what halts, as a printed module shows it.

        Example:
            >>> import adatape_kernels as ak
            >>> layer = ak.layers.ElasticEncoderLayer(8, 2, 16)
            >>> encoder = ak.layers.UniversalEncoder([layer], 8, 6, ak.halting.Halting.act())
            >>> encoder.extra_repr()
            'max_steps=6, halting=example, threshold=0.99, update=basic'
        """
        return f"max_steps={self.max_steps}, {described(self.halting)}"

    def _layer(self, step: int) -> ElasticEncoderLayer:
        layer = self.layers[step % len(self.layers)]
        assert isinstance(layer, ElasticEncoderLayer)
        return layer


class AViTEncoder(ElasticModule):
    """Layers after each of which single rows may halt and leave (A-ViT).

    Args:
        layers: the layers, in order.
        dim: width of a token.
        gate: what gives the halting probabilities, called as `FeatureGate.forward` is.
        halting: the rule; None for `Halting.avit()`.
        keep_class_token: whether the first row of each example halts in the last layer only.
        class_token: whether that row is a class token, which the means of layers leave out.
        norm_eps: epsilon of the final LayerNorm.

    Raises:
        ValueError: there are no layers, or an argument is out of range.
        TypeError: an argument is of another type altogether.

    Source: SPEC 12.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(3)]
        >>> encoder = ak.layers.AViTEncoder(layers, 8, ak.layers.FeatureGate(1.0, -99.0))
        >>> halted = encoder(ak.ElasticBatch.from_padded(torch.randn(2, 4, 8)))
        >>> halted.state.rows_per_step, halted.means.shape  # all rows halt at once
        ((8,), torch.Size([3]))
    """

    def __init__(
        self,
        layers: Iterable[ElasticEncoderLayer],
        dim: int,
        gate: nn.Module,
        halting: Halting | None = None,
        *,
        keep_class_token: bool = False,
        class_token: bool = True,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.layers = nn.ModuleList([*layers])
        if not self.layers:
            raise ValueError("layers: expected one or more, got none")
        check_number("norm_eps", norm_eps, 0)
        check_kind("gate", gate, nn.Module)
        check_flag("keep_class_token", keep_class_token)
        check_flag("class_token", class_token)
        if keep_class_token and not class_token:
            raise ValueError("keep_class_token: expected False without a class token, got True")
        self.halting = Halting.avit() if halting is None else halting
        check_kind("halting", self.halting, Halting)
        _check_rows_halt(self.halting)
        self.dim = check_size("dim", dim)
        self.gate = gate
        self.keep_class_token, self.class_token = keep_class_token, class_token
        self.norm = nn.LayerNorm(dim, norm_eps)

    def forward(
        self,
        x: ElasticBatch,
        *,
        apply: ApplyLayer = apply_layer,
        halting: Halting | None = None,
    ) -> Halted:
        """Encode a batch.

        Args:
            x: rows (rows, dim) of the parameters' dtype, a class token first in each example.
            apply: how a layer is applied to a batch.
            halting: a rule for this call in the place of the encoder's own.

        Returns:
            As `means`, of each layer the mean over the rows that it computed without class tokens,
            0 where there were none.

        Raises:
            TypeError: x is no ElasticBatch, or halting no rule.
            ValueError: the rule does not fit, or a halting unit of another class returned something
                else than probabilities.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layers = [ak.layers.ElasticEncoderLayer(8, 2, 16) for _ in range(3)]
            >>> encoder = ak.layers.AViTEncoder(layers, 8, ak.layers.FeatureGate(1.0, 99.0))
            >>> halted = encoder(ak.ElasticBatch.from_padded(torch.randn(2, 4, 8)))
            >>> halted.state.rows_per_step  # no row halts before the last layer
            (8, 8, 8)
        """
        check_kind("x", x, ElasticBatch)
        rule = _rule_of(self.halting, halting, apply)
        assert rule is not None
        _check_rows_halt(rule)
        state, means = rule.start(x), []
        # One entry more than there are rows. Until it is cleared it is the beginning of examples
        # without rows; then it stands for unused rows, whose number is -1.
        rows = x.data.shape[0]
        starts = x.cu_inputs[:-1].where(x.cu_inputs.diff() > 0, rows).long()
        is_class = torch.zeros(rows + 1, dtype=torch.bool, device=x.device)
        if self.class_token:
            is_class = nn.functional.pad(is_class.index_fill(0, starts, True)[:-1], (0, 1))
        for number, layer in enumerate(self.layers):
            if state.done:
                means.append(state.total.new_zeros(()))
                continue
            assert isinstance(layer, ElasticEncoderLayer)
            data = apply(layer, state.batch, state).data
            probabilities = self.gate(state, data)
            if type(self.gate) is not FeatureGate:
                rule.check_step(state, probabilities, data)
            class_rows = is_class[state.origin.long()]
            counted = state.rows_that_run & ~class_rows
            total = probabilities.where(counted, 0).sum()
            means.append(total / counted.sum().clamp(min=1))
            if self.keep_class_token:
                probabilities = probabilities.where(~class_rows, 0)
            state = rule.advance(state, probabilities, data, last=number == len(self.layers) - 1)
        y = state.output
        return Halted(y.with_data(self.norm(y.data)), state, torch.stack(means))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """Return when rows halt, as a printed module shows it.

        Example:
            >>> import adatape_kernels as ak
            >>> layer = ak.layers.ElasticEncoderLayer(8, 2, 16)
            >>> ak.layers.AViTEncoder([layer], 8, ak.layers.FeatureGate()).extra_repr()
            'halting=row, threshold=0.99, update=accumulated, force_halt=True'
        """
        text = described(self.halting)
        return f"{text}, keep_class_token=True" if self.keep_class_token else text


def _rule_of(own: Halting | None, given: Halting | None, apply: ApplyLayer) -> Halting | None:
    """Return the rule of a call.

    Raises:
        TypeError: what was given is no rule.
        ValueError: rows that would leave are to be masked, and the layer would show them to others.
    """
    if given is not None:
        check_kind("halting", given, Halting)
    rule = own if given is None else given
    if rule is not None and rule.masked and rule.leave == "row" and apply is apply_layer:
        raise ValueError(
            "apply: expected one that hides halted rows, for a masked rule by which rows leave, "
            "got the default, which shows them"
        )
    return rule


def _check_rows_halt(rule: Halting) -> None:
    if rule.level != "row":
        raise ValueError("halting: expected a rule by which rows halt, got one for examples")


def described(rule: Halting | None) -> str:
    """Return in words when what halts."""
    if rule is None:
        return "halting=None"
    leave = f", leave={rule.leave}" if rule.leave != rule.level else ""
    forced = ", force_halt=True" if rule.force_halt else ""
    return (
        f"halting={rule.level}, threshold={rule.threshold:g}, update={rule.update}{leave}{forced}"
    )
