"""timm's VisionTransformer and NaFlexVit with patched blocks, which take ragged batches.

As in `patched_block`, these are the first parents of a patched model's class. A call with a tensor
is timm's own, in which the blocks are ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adatape_kernels.arguments import shown
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.conversion import class_name
from adatape_kernels.models.pretrained.patched_block import PatchedModule
from adatape_kernels.offsets import cumulative
from adatape_kernels.pooling import Pooling

_POOLINGS: dict[str, tuple[Pooling, ...]] = {
    "avg": ("mean",),
    "max": ("max",),
    "avgmax": ("max", "mean"),
}


class PatchedModel(PatchedModule):
    """What patched models have in common: the way of a ragged batch through them."""

    blocks: nn.Module
    norm: nn.Module
    fc_norm: nn.Module
    head_drop: nn.Module
    head: nn.Module
    embed_dim: int
    num_prefix_tokens: int
    global_pool: str
    grad_checkpointing: bool

    def _embedded(self, images: Tensor) -> Tensor:
        """Return the tokens (batch, seqlen, dim) of images of one size."""
        raise NotImplementedError

    def _ragged_features(self, x: Any, *others: Any) -> ElasticBatch:
        """Return the rows behind the last norm, of images in a list or of embedded tokens."""
        modules = [each for each in type(self).__mro__ if issubclass(each, nn.Module)]
        theirs = next(each for each in modules if not issubclass(each, PatchedModule))
        for name in ("forward_features", "forward_head"):
            if not getattr(theirs, name).__module__.startswith("timm."):
                raise TypeError(
                    f"x: expected a tensor, as {theirs.__qualname__} has a {name} of its own, "
                    f"got {type(x).__name__}"
                )
        if any(each is not None and each is not False for each in others):
            raise ValueError("x: expected a tensor where a mask is given, got a ragged batch")
        if not isinstance(x, ElasticBatch):
            x = self._of_images(x)
        if x.data.dim() != 2 or x.data.shape[1] != self.embed_dim:
            raise ValueError(
                f"x: expected rows of embedded tokens (rows, {self.embed_dim}), "
                f"got {tuple(x.data.shape)}"
            )
        return self._encoded(x)

    def _of_images(self, images: Any) -> ElasticBatch:
        """Return the tokens of images (channels, height, width) of any sizes."""
        if not isinstance(images, (list, tuple)) or len(images) == 0:
            raise TypeError(
                "x: expected a tensor, a list of images or an ElasticBatch, "
                f"got {'no images' if isinstance(images, (list, tuple)) else shown(images)}"
            )
        channels = getattr(self, "in_chans", 3)  # older versions of timm do not keep it
        numbers: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            if not isinstance(image, Tensor):
                raise TypeError(f"x: expected a list of tensors, got {type(image).__name__}")
            if image.dim() != 3 or image.shape[0] != channels:
                raise ValueError(
                    f"x: expected images ({channels}, height, width), got {tuple(image.shape)}"
                )
            numbers.setdefault(image.shape, []).append(number)
        parts: list[Tensor] = [*images]
        for same in numbers.values():  # images of one size are embedded at once
            embedded = self._embedded(torch.stack([images[number] for number in same]))
            for number, tokens in zip(same, embedded, strict=True):
                parts[number] = tokens
        lens = torch.tensor([len(part) for part in parts], device=parts[0].device)
        return ElasticBatch.from_packed(torch.cat(parts), cumulative(lens))

    def _encoded(self, x: ElasticBatch) -> ElasticBatch:
        """Return the rows behind the blocks and the last norm."""
        if isinstance(self.blocks, nn.Sequential) and not self.grad_checkpointing:
            x = self.blocks(x)
        else:
            for block in self.blocks.children():
                once = self.grad_checkpointing
                x = checkpoint(block, x, use_reentrant=False) if once else block(x)
        return x.with_data(x.clear_unused(self.norm(x.data)))

    def _ragged_head(self, x: ElasticBatch, pre_logits: bool) -> Any:
        """Return logits (batch, num_classes), or a batch of rows where nothing is pooled."""
        pooled = self._ragged_pool(x, self.global_pool)
        rows = pooled if isinstance(pooled, Tensor) else pooled.data
        rows = self.head_drop(self.fc_norm(rows))
        rows = rows if pre_logits else self.head(rows)
        return rows if isinstance(pooled, Tensor) else x.with_data(x.clear_unused(rows))

    def _ragged_pool(self, x: ElasticBatch, kind: str) -> Tensor | ElasticBatch:
        """Return (batch, dim), or what was given where nothing is pooled."""
        attn_pool = getattr(self, "attn_pool", None)
        if attn_pool is None and kind in ("", "token"):
            return x.pool("token") if kind else x
        if not getattr(self, "pool_include_prefix", False):
            x = _without_first(x, self.num_prefix_tokens)
        if attn_pool is None:
            pooled = [x.pool(each) for each in _POOLINGS[kind]]
            return sum(pooled[1:], pooled[0]) / len(pooled)
        if type(attn_pool).__name__ != "AttentionPoolLatent":
            raise TypeError(
                f"x: expected a tensor for pooling by {class_name(attn_pool)}, got an ElasticBatch"
            )
        rows, mask = x.to_padded()
        hidden = torch.zeros_like(mask, dtype=rows.dtype).masked_fill(~mask, float("-inf"))
        return attn_pool(rows, attn_mask=hidden[:, None, None])


class PatchedViT(PatchedModel):
    """timm's VisionTransformer, or a class of your own that extends it."""

    patch_embed: nn.Module
    patch_drop: nn.Module
    norm_pre: nn.Module

    def forward_features(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return what timm's method returns, or an ElasticBatch of rows for a ragged batch."""
        if not isinstance(x, Tensor):
            return self._ragged_features(x, *args, *options.values())
        timm: Any = super()
        return timm.forward_features(x, *args, **options)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Return what timm's method returns, of features (batch, seqlen, dim) or of a batch."""
        timm: Any = super()
        if not isinstance(x, ElasticBatch):
            return timm.forward_head(x, pre_logits=pre_logits)
        if hasattr(self, "head_dist"):  # timm's head for distillation reads two tokens alone
            return timm.forward_head(_first_rows(x, 2), pre_logits=pre_logits)
        return self._ragged_head(x, pre_logits)

    def pool(self, x: Any, pool_type: str | None = None) -> Any:
        """Return (batch, dim), or what was given where nothing is pooled."""
        if isinstance(x, ElasticBatch):
            return self._ragged_pool(x, self.global_pool if pool_type is None else pool_type)
        timm: Any = super()
        return timm.pool(x, pool_type=pool_type)

    def forward_intermediates(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return what timm's method returns, for a tensor alone."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor for intermediates, got {type(x).__name__}")
        timm: Any = super()
        return timm.forward_intermediates(x, *args, **options)

    def _embedded(self, images: Tensor) -> Tensor:
        expected = getattr(self.patch_embed, "img_size", None)
        if not getattr(self, "dynamic_img_size", False) and expected is not None:
            if images.shape[2:] != tuple(expected):
                raise ValueError(
                    f"x: expected images of {tuple(expected)}, as the model was made without "
                    f"dynamic_img_size=True, got {tuple(images.shape[2:])}"
                )
        model: Any = self
        return self.norm_pre(self.patch_drop(model._pos_embed(self.patch_embed(images))))


class PatchedNaFlexViT(PatchedModel):
    """timm's NaFlexVit. Of patches with `patch_valid`, blocks see the valid ones alone."""

    embeds: nn.Module
    norm_pre: nn.Module

    def forward_features(
        self,
        patches: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """Return what timm's method returns, with zeros where patches are not valid."""
        if not isinstance(patches, Tensor):
            return self._ragged_features(patches, patch_coord, patch_valid, attn_mask)
        if patch_coord is None or patch_valid is None or attn_mask is not None:
            timm: Any = super()
            return timm.forward_features(
                patches, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask
            )
        tokens, _ = self.embeds(patches, patch_coord=patch_coord, patch_valid=patch_valid)
        tokens, kept = self._patches_dropped(tokens)
        patch_valid = patch_valid if kept is None else patch_valid.gather(1, kept)
        mask = patch_valid.bool()
        always = mask.new_ones(mask.shape[0], self.num_prefix_tokens)
        mask = torch.cat([always, mask], 1)
        x = self._encoded(ElasticBatch.from_padded(self.norm_pre(tokens), mask))
        rows = x.data.new_zeros(*mask.shape, x.data.shape[1]).index_put((mask,), x.data)
        return {"patches": rows, "patch_valid": patch_valid}

    def forward_head(
        self, patches: Any, pre_logits: bool = False, patch_valid: Tensor | None = None
    ) -> Any:
        """Return what timm's method returns, of features (batch, seqlen, dim) or of a batch."""
        if isinstance(patches, ElasticBatch):
            return self._ragged_head(patches, pre_logits)
        timm: Any = super()
        return timm.forward_head(patches, pre_logits=pre_logits, patch_valid=patch_valid)

    def _patches_dropped(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        drop = getattr(self, "patch_drop", None)
        return (tokens, None) if drop is None or not self.training else drop(tokens)

    def _embedded(self, images: Tensor) -> Tensor:
        tokens, _ = self.embeds(images)
        return self.norm_pre(self._patches_dropped(tokens)[0])


def _first_rows(x: ElasticBatch, count: int) -> Tensor:
    """Return each example's first input rows, (batch, count, dim)."""
    _check_first(x, count)
    first = torch.arange(count, device=x.data.device)
    return x.data[x.cu_inputs[:-1].unsqueeze(1) + first]


def _without_first(x: ElasticBatch, count: int) -> ElasticBatch:
    """Return a batch without each example's first input rows."""
    if count == 0:
        return x
    _check_first(x, count)
    cu_inputs = x.cu_inputs - count * torch.arange(
        x.batch + 1, dtype=torch.int32, device=x.data.device
    )
    kept = torch.arange(x.data.shape[0] - count * x.batch, device=x.data.device)
    example = torch.searchsorted(cu_inputs[1:], kept, right=True)
    # A tape row lies behind the rows of all examples, and loses as many rows before it.
    rows = kept + count * (example + 1).clamp(max=x.batch)
    return ElasticBatch(
        x.data.index_select(0, rows),
        cu_inputs,
        x.cu_tapes - count * x.batch,
        x.num_input_rows - count * x.batch,
        x.min_inputs - count,
        x.max_inputs - count,
        x.max_tapes,
        x.exact,
    )


def _check_first(x: ElasticBatch, count: int) -> None:
    if x.min_inputs < count and x.batch > 0:
        raise ValueError(
            f"x: expected {count} or more tokens in every example, as the model has so many before "
            f"its patches, got {x.min_inputs}"
        )
