"""Blocks of timm's ViTs whose attention and MLP are our ops, on tensors and on ragged batches.

To patch a module is to give it another class, which extends the one that it had. Its parameters,
submodules, hooks and attributes stay what and where they were, and so do its state dict, its
optimizers and all that asks for `isinstance`.

The classes of this file are the first parents of such classes, timm's own are the second, and
`super()` is timm's computation. It serves calls that ours does not, such as those with a mask.
Nothing here imports timm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adatape_kernels import ops, reference
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.conversion import activation_name
from adatape_kernels.layers.torch_modules import bias_of, is_bare, is_plain
from adatape_kernels.models.pretrained.source_vit import kind
from adatape_kernels.op_types import FFN, Activation

_TIMM_ACTIVATIONS: dict[str, Activation] = {"timm.GELU": "gelu", "timm.GELUTanh": "gelu_tanh"}


class PatchedModule(nn.Module):
    """What all patched modules are."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the parents of a class that no module holds, so that copies and pickles find it."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _without_state, type(self).__bases__, *reduced[2:]


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
"""The classes of patched modules, by their parents; each pair of parents has one."""


def patched_class(first: type[PatchedModule], own: type[nn.Module]) -> type[nn.Module]:
    """Return the class that extends a module's own class by one of the classes of patched modules.

    Args:
        first: what the new class computes otherwise than the module's own.
        own: the class of the module.
    """
    parents = first, own
    if parents not in _CLASSES:
        _CLASSES[parents] = type(first.__name__, parents, {"__module__": first.__module__})
    return _CLASSES[parents]


def own_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a patched module had, or None if something else changed it since."""
    parents = type(module).__bases__
    if len(parents) == 2 and issubclass(parents[0], PatchedModule):
        return parents[1] if _CLASSES.get(parents) is type(module) else None
    return None


def _without_state(*parents: Any) -> nn.Module:
    made = patched_class(*parents)
    return made.__new__(made)


class PatchedAttention(PatchedModule):
    """timm's Attention, by the op.

    Linear modules and norms are called, whatever they are. Calls with a mask, causal ones, those
    that drop attention weights and those whose weights a hook wants to see are timm's.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    num_heads: int
    head_dim: int
    scale: float
    fused_attn: bool

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Attend within each example.

        Args:
            x: (batch, seqlen, dim), or an ElasticBatch of rows (rows, dim).
            attn_mask, is_causal: as in timm, for tensors alone.

        Returns:
            What was given: a tensor or an ElasticBatch, whose unused rows are zero.
        """
        timm: Any = super()
        given = _given(attn_mask, is_causal)
        own = given or not is_bare(self.attn_drop)
        if not isinstance(x, ElasticBatch):
            if own or self._rate() > 0:
                return timm.forward(x, **given)
            return self._attended(x, ElasticBatch.from_padded(x))
        if own:
            raise ValueError(
                "x: expected a tensor where attention has a mask, is causal, or has hooks on "
                "attn_drop, got an ElasticBatch"
            )
        return x.with_data(x.clear_unused(self._attended(x.data, x)))

    def _rate(self) -> float:
        return getattr(self.attn_drop, "p", 0.0) if self.training else 0.0

    def _attended(self, x: Tensor, layout: ElasticBatch) -> Tensor:
        """Return (..., dim) for the rows (..., dim) of a layout."""
        qkv = self.qkv(x).reshape(-1, 3, self.num_heads, self.head_dim)
        # torch's own attention, which timm calls where fused_attn is true, does not know `scale`.
        scale = None if self.fused_attn else self.scale
        out = self._attention(qkv, layout, scale)
        out = out.reshape(*x.shape[:-1], self.num_heads * self.head_dim)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attention(self, qkv: Tensor, layout: ElasticBatch, scale: float | None) -> Tensor:
        """Return the heads' results (rows, num_heads, head_dim), before what follows them."""
        offsets = layout.cu_inputs, layout.cu_tapes
        rate = self._rate()
        if rate == 0 and _is_nothing(self.q_norm) and _is_nothing(self.k_norm):
            return ops.elastic_attention_qkvpacked(
                qkv, *offsets, max_rows=layout.max_rows, softmax_scale=scale
            )
        q, k, v = qkv.unbind(1)  # (rows, num_heads, head_dim)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rate == 0:
            return ops.elastic_attention(
                q, k, v, *offsets, max_rows=layout.max_rows, softmax_scale=scale
            )
        out, _ = reference.elastic_attention(q, k, v, *offsets, softmax_scale=scale, dropout=rate)
        return out


def _is_nothing(norm: nn.Module) -> bool:
    """Return whether calling a module returns its argument and runs nothing else."""
    return type(norm) is nn.Identity and is_bare(norm)


class PatchedMlp(PatchedModule):
    """timm's Mlp, by the op where its parts are plain modules and nothing is dropped in between."""

    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module
    drop1: nn.Module
    drop2: nn.Module

    def forward(self, x: Any) -> Any:
        """Apply the MLP to every row.

        Args:
            x: (..., dim), or an ElasticBatch of rows (rows, dim).

        Returns:
            What was given: a tensor or an ElasticBatch, whose unused rows are zero.
        """
        rows = x.data if isinstance(x, ElasticBatch) else x
        activation = self._fused_activation()
        if activation is None:
            timm: Any = super()
            y = timm.forward(rows)
        else:
            flat = rows.reshape(-1, rows.shape[-1])
            ffn = FFN(self.fc1.weight, bias_of(self.fc1), self.fc2.weight, bias_of(self.fc2))
            used = x.num_used_rows if isinstance(x, ElasticBatch) else None
            y = ops.dual_ffn(flat, flat.shape[0], ffn, num_rows=used, activation=activation)
            y = self.drop2(y.reshape(*rows.shape[:-1], y.shape[-1]))
        return x.with_data(x.clear_unused(y)) if isinstance(x, ElasticBatch) else y

    def _fused_activation(self) -> Activation | None:
        """Return the op's name of the activation, or None where the op does not do all there is."""
        if not (is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)):
            return None
        norm = getattr(self, "norm", None)
        if norm is not None and not (type(norm) is nn.Identity and is_bare(norm)):
            return None
        if not is_bare(self.drop1) or (self.drop1.training and getattr(self.drop1, "p", 0.0) > 0):
            return None
        if not is_bare(self.act):
            return None
        return _TIMM_ACTIVATIONS.get(kind(self.act)) or activation_name(self.act)


class PatchedBlock(PatchedModule):
    """timm's Block; the sum behind attention and the norm that follows it are one op."""

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Apply the block.

        Args:
            x: (batch, seqlen, dim), or an ElasticBatch of rows (rows, dim).
            attn_mask, is_causal: as in timm, for tensors alone.

        Returns:
            What was given: a tensor or an ElasticBatch.
        """
        given = _given(attn_mask, is_causal)
        if not isinstance(x, ElasticBatch):
            branch = self.drop_path1(self.ls1(self.attn(self.norm1(x), **given)))
            total, normed = _add_norm(x, branch, self.norm2)
            return total + self.drop_path2(self.ls2(self.mlp(normed)))
        attended = self.attn(x.with_data(self.norm1(x.data)), **given).data
        branch = _dropped(x, self.ls1(attended), self.drop_path1)
        total, normed = _add_norm(x.data, branch, self.norm2)
        if isinstance(self.mlp, PatchedMlp):
            fed_forward = self.mlp(x.with_data(normed)).data
        else:  # another of timm's, which takes rows of any number
            fed_forward = x.clear_unused(self.mlp(normed))
        return x.with_data(total + _dropped(x, self.ls2(fed_forward), self.drop_path2))


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return the arguments of timm's attention that are given; its older versions know fewer."""
    given: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return {**given, "is_causal": True} if is_causal else given


def _add_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return x + branch and its norm, (..., dim): by the op, or by calling another norm."""
    plain = type(norm) is nn.LayerNorm or kind(norm) == "timm.LayerNorm"
    if not plain or getattr(norm, "_fast_norm", False) or not is_plain(norm, type(norm)):
        total = x + branch
        return total, norm(total)
    assert isinstance(norm, nn.LayerNorm)
    x = x.to(torch.promote_types(x.dtype, branch.dtype))
    rows, branches = x.reshape(-1, x.shape[-1]), branch.reshape(-1, x.shape[-1])
    total, normed = ops.add_layer_norm(rows, branches, norm.weight, bias_of(norm), norm.eps)
    return total.reshape(x.shape), normed.reshape(x.shape)


def _dropped(x: ElasticBatch, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """Return a branch's rows, in training after timm's stochastic depth, which drops examples."""
    if not (drop_path.training and getattr(drop_path, "drop_prob", 0.0) > 0):
        return branch
    # The factor of each example is what becomes of a one; the last one is for unused rows.
    factors = drop_path(branch.new_ones(x.batch, 1, 1)).flatten()
    factors = torch.cat([factors, factors.new_zeros(1)])
    return branch * factors[x.example_of_rows()].unsqueeze(1)
