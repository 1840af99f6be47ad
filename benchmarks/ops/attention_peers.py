"""What else computes attention over a ragged batch; each peer has the rows in its own layout."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adatape_kernels.benchmarks.harness.cases import (
    Prepared,
    Provider,
    Skipped,
    only_on_cuda,
    skipped,
)
from adatape_kernels.offsets import packed_order

BUCKETS = 4


class AttentionInputs(NamedTuple):
    """q, k and v in the elastic layout, and the gradient of the output."""

    qkv: Tensor
    """(rows, 3, num_heads, head_dim)."""
    dout: Tensor
    """(rows, num_heads, head_dim)."""
    cu_inputs: Tensor
    cu_tapes: Tensor
    lens: list[int]
    """The number of rows of each example."""
    backward: bool

    @property
    def order(self) -> Tensor:
        """Where each row stands in the elastic layout, example after example."""
        return packed_order(self.cu_inputs, self.cu_tapes, len(self.qkv))

    def packed(self) -> tuple[Tensor, Tensor]:
        """Return qkv, a leaf, and dout, example after example; all results have this order."""
        qkv = self.qkv.detach().index_select(0, self.order)
        return qkv.requires_grad_(self.backward), self.dout.index_select(0, self.order)

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each example begins in that order, (batch + 1,) int32."""
        return F.pad(torch.tensor(self.lens).cumsum(0), (1, 0)).int().to(self.qkv.device)


class PaddedBlock(NamedTuple):
    """Some of the examples, padded to the longest of them."""

    qkv: Tensor
    """(examples, longest, 3, num_heads, head_dim); a leaf."""
    dout: Tensor
    """(examples, num_heads, longest, head_dim)."""
    mask: Tensor
    """(examples, longest)."""
    rows: Tensor
    """Where these rows stand in example-after-example order."""


def blocks(given: AttentionInputs, members: Sequence[Sequence[int]]) -> list[PaddedBlock]:
    """Return one padded block for each list of examples."""
    qkv, dout = given.packed()
    device = qkv.device
    starts = torch.tensor([0, *given.lens], device=device).cumsum(0)
    lens = torch.tensor(given.lens, device=device)
    made = []
    for examples in members:
        chosen = torch.tensor(examples, device=device)
        places = torch.arange(int(lens[chosen].max()), device=device)
        mask = places < lens[chosen].unsqueeze(1)
        rows = (starts[chosen].unsqueeze(1) + places)[mask]
        padded = [
            x.new_zeros(*mask.shape, *x.shape[1:]).index_put((mask,), x[rows])
            for x in (qkv.detach(), dout)
        ]
        made.append(
            PaddedBlock(
                padded[0].requires_grad_(given.backward), padded[1].transpose(1, 2), mask, rows
            )
        )
    return made


def sdpa(
    split: Callable[[list[int]], list[list[int]]],
    backend: SDPBackend | None = None,
    masked: bool = True,
) -> Callable[[AttentionInputs], Prepared]:
    """Return a peer that pads the examples block by block; without a mask blocks must be full."""

    def prepare(given: AttentionInputs) -> Prepared:
        parts = blocks(given, split(given.lens))
        masks = [None if part.mask.all() else part.mask[:, None, None] for part in parts]
        if not masked and any(mask is not None for mask in masks):
            raise Skipped("the lengths differ, and it takes no mask")

        def forward() -> list[Tensor]:
            return [
                F.scaled_dot_product_attention(
                    *part.qkv.permute(2, 0, 3, 1, 4), attn_mask=mask if masked else None
                )
                for part, mask in zip(parts, masks, strict=True)
            ]

        def run() -> Sequence[Tensor]:
            if backend is None:
                outs = forward()
            else:
                with sdpa_kernel(backend):
                    outs = forward()
            if not given.backward:
                return outs
            return torch.autograd.grad(outs, [p.qkv for p in parts], [p.dout for p in parts])

        def results(found: Sequence[Tensor]) -> list[Tensor]:
            whole = torch.empty_like(given.qkv if given.backward else given.dout).detach()
            for part, x in zip(parts, found, strict=True):
                whole[part.rows] = (x if given.backward else x.transpose(1, 2))[part.mask]
            return [whole]

        if backend is not None:
            try:
                run()
            except RuntimeError as error:
                raise Skipped(str(error).partition("\n")[0]) from None
        return Prepared(run, results, _chosen(parts[0], masks[0], backend))

    return prepare


def _chosen(part: PaddedBlock, mask: Tensor | None, backend: SDPBackend | None) -> str:
    """Return in words which kernel torch takes for a block."""
    if backend is None:
        q, k, v = part.qkv.permute(2, 0, 3, 1, 4)
        try:
            backend = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, False))
        except (AttributeError, RuntimeError, ValueError) as error:
            return f"torch does not say which kernel SDPA took: {error}".partition("\n")[0]
    return f"SDPA took {backend.name.lower()}"


def together(lens: list[int]) -> list[list[int]]:
    return [list(range(len(lens)))]


def one_by_one(lens: list[int]) -> list[list[int]]:
    return [[i] for i, rows in enumerate(lens) if rows]


def by_length(lens: list[int]) -> list[list[int]]:
    order = sorted(range(len(lens)), key=lens.__getitem__)
    size = -(-len(order) // BUCKETS)
    return [order[i : i + size] for i in range(0, len(order), size)]


def varlen(given: AttentionInputs) -> Prepared:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Skipped(f"this torch has no varlen_attn: {error}") from None
    qkv, dout = given.packed()
    bounds, longest = given.cu_seqlens, max(given.lens)

    def run() -> Tensor:
        q, k, v = qkv.unbind(1)
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        return torch.autograd.grad(out, qkv, dout)[0] if given.backward else out

    return Prepared(run, lambda out: [out])


def nested(given: AttentionInputs) -> Prepared:
    packed, dout = given.packed()
    # The fused kernels want each of q, k and v contiguous.
    leaves = [x.contiguous().requires_grad_(given.backward) for x in packed.detach().unbind(1)]
    offsets = given.cu_seqlens.long()
    longest, shortest = max(given.lens), min(given.lens)

    def run() -> Sequence[Tensor]:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x, offsets, min_seqlen=shortest, max_seqlen=longest
            ).transpose(1, 2)
            for x in leaves
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
        return torch.autograd.grad(out, leaves, dout) if given.backward else [out]

    def results(found: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(found), 1) if given.backward else found[0]]

    return Prepared(run, results)


class _Flex:
    """FlexAttention over all rows as one sequence, whose mask keeps examples apart."""

    @cached_property
    def attention(self):
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention, dynamic=False)

    @cached_property
    def block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        return torch.compile(create_block_mask, dynamic=False)

    def prepare(self, given: AttentionInputs, with_mask: bool) -> Prepared:
        qkv, dout = given.packed()
        rows = len(qkv)
        lens = torch.tensor(given.lens, device=qkv.device)
        example = torch.repeat_interleave(lens)

        def same_example(batch, head, query, key):
            return example[query] == example[key]

        def mask():
            return self.block_mask(same_example, None, None, rows, rows, device=qkv.device.type)

        made = mask()

        def run() -> Tensor:
            q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)
            out = self.attention(q, k, v, block_mask=mask() if with_mask else made)
            out = out.squeeze(0).transpose(0, 1)
            return torch.autograd.grad(out, qkv, dout)[0] if given.backward else out

        return Prepared(run, lambda out: [out])


def flex(name: str, with_mask: bool, device_type: str, backward: bool) -> Provider:
    if device_type == "cpu" and backward:
        return skipped(name, "compiled FlexAttention has no backward on the CPU")
    compiler = _Flex()
    return Provider(name, lambda given: compiler.prepare(given, with_mask), compiled=True)


NAMES = (
    "padded SDPA",
    "padded SDPA cudnn",
    "padded SDPA efficient",
    "padded SDPA flash, no mask",
    "SDPA each",
    "SDPA buckets",
    "varlen_attn",
    "nested tensors",
    "FlexAttention",
    "FlexAttention + mask",
)


def providers(device_type: str, dtype: torch.dtype, backward: bool) -> list[Provider]:
    """Return all peers in the order of NAMES."""
    padded, cudnn, efficient, flash, each, buckets, packed, jagged, flexed, with_mask = NAMES
    reduced = dtype in (torch.float16, torch.bfloat16)
    half_only = "it takes float16 and bfloat16 only"
    return [
        Provider(padded, sdpa(together)),
        only_on_cuda(Provider(cudnn, sdpa(together, SDPBackend.CUDNN_ATTENTION)), device_type)
        if reduced or device_type == "cpu"
        else skipped(cudnn, half_only),
        only_on_cuda(
            Provider(efficient, sdpa(together, SDPBackend.EFFICIENT_ATTENTION)), device_type
        ),
        Provider(flash, sdpa(together, SDPBackend.FLASH_ATTENTION, masked=False)),
        Provider(each, sdpa(one_by_one)),
        Provider(buckets, sdpa(by_length)),
        only_on_cuda(Provider(packed, varlen), device_type)
        if reduced or device_type == "cpu"
        else skipped(packed, half_only),
        Provider(jagged, nested),
        flex(flexed, False, device_type, backward),
        flex(with_mask, True, device_type, backward),
    ]
