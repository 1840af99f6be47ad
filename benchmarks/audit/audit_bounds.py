"""What the code of each kernel must keep, as the audits and the tests hold it: a table."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

ALL = (80, 86, 89, 90, 100, 120)
LARGE = (80, 90, 100)
"""The chips whose multiprocessors have at least 164 KiB of shared memory, and 64 warps."""


class AuditedCode(Protocol):
    """The columns of an audit's row that bounds are about."""

    kernel: str
    case: str
    arch: int
    blocks: int
    in_flight: int
    wide: int
    bf16: int
    fp16: int
    tf32: int
    waves: float


@dataclass(frozen=True)
class Bound:
    """What a kernel must keep on some chips, in the cases whose names a regex matches."""

    kernel: str
    cases: str = ""
    archs: tuple[int, ...] = ALL
    blocks: int = 1
    """The least number of blocks that a multiprocessor must hold at once."""
    in_flight: int = 0
    """The least number of groups of asynchronous copies on their way where the kernel waits."""
    wide: int = 0
    """The least percentage of global memory's bytes that are accessed by 16 at once."""
    products: tuple[str, ...] = ()
    """The dtypes whose factors tensor cores must multiply: "bf16", "fp16", "tf32"."""
    waves: float = math.inf
    """The most times that the case's launch may fill the GPU."""
    filled: float = 0.0
    """The least blocks that the case's launch must have for each that the GPU holds at once."""

    def concerns(self, row: AuditedCode) -> bool:
        """Return whether a row is one of those that the bound is about."""
        named = self.kernel == row.kernel and re.search(self.cases, row.case) is not None
        return named and row.arch in self.archs

    def faults(self, row: AuditedCode) -> Iterator[str]:
        """Yield, in words, where a row passes the bound."""
        if row.blocks < self.blocks:
            yield f"blocks a multiprocessor: {row.blocks}, at least {self.blocks}"
        if row.in_flight < self.in_flight:
            yield f"asynchronous copies in flight: {row.in_flight}, at least {self.in_flight}"
        if row.wide < self.wide:
            yield f"accesses of 16 bytes: {row.wide} %, at least {self.wide} %"
        for dtype in self.products:
            if not getattr(row, dtype):
                yield f"tensor cores: no product of {dtype}"
        if row.waves > self.waves:
            yield f"waves: {row.waves}, at most {self.waves}"
        if row.waves < self.filled:
            yield f"waves: {row.waves}, at least {self.filled}"


def faults_of(row: AuditedCode, bounds: tuple[Bound, ...]) -> Iterator[str]:
    """Yield what is wrong with a row beside those of the bounds that concern it."""
    if row.blocks < 1:
        yield "no block of it fits a multiprocessor"
    for bound in bounds:
        if bound.concerns(row):
            yield from bound.faults(row)


BF16, FP16 = r"\bbf16$", r"\bfp16$"
WIDE_HEADS = r"^(32|64|80|96|128) a head, "
MODELS = r"^(S/16|B/32), "

BOUNDS = (
    *(
        bound
        for dtype, factors in ((BF16, ("bf16",)), (FP16, ("fp16",)))
        for bound in (
            Bound("_elastic_attention_fwd_kernel", WIDE_HEADS + ".*" + dtype, products=factors),
            Bound("_elastic_attention_bwd_kernel", WIDE_HEADS + ".*" + dtype, products=factors),
            *(
                Bound(f"_dual_ffn_{name}_kernel", "^384 × .*" + dtype, products=factors)
                for name in ("up", "down", "weight")
            ),
        )
    ),
    # Blocks of four warps, and the next tile's copies, are what hides the wait for keys and values.
    # Of three stages chips with 100 KiB hold two blocks; on 10.0 a fourth block lacks 128 bytes.
    Bound(
        "_elastic_attention_fwd_kernel", MODELS, blocks=2, in_flight=2, wide=90, products=("bf16",)
    ),
    Bound("_elastic_attention_fwd_kernel", MODELS, (80, 100), blocks=3),
    Bound("_elastic_attention_fwd_kernel", MODELS, (90,), blocks=4),
    Bound(
        "_elastic_attention_bwd_kernel", MODELS, blocks=2, in_flight=4, wide=90, products=("bf16",)
    ),
    Bound("_elastic_attention_bwd_kernel", MODELS, LARGE, blocks=3),
    Bound("_elastic_attention_fwd_kernel", r"^(8|24|32|64) a head, fp32$", in_flight=2),
    # The grouped products are persistent: one wave, whose tiles are always on their way.
    *(
        Bound(f"_dual_ffn_{name}_kernel", "^384 × .*grouped, (bf16|fp16)", LARGE, **kept)
        for name, kept in (
            ("up", dict(wide=85, waves=1.0)),
            ("down", dict(in_flight=2, wide=85, waves=1.0)),
            ("weight", dict(in_flight=2, wide=90, waves=1.0)),
        )
    ),
    # From 9.0 on the first product's tiles come by bulk copies, which are no groups to be counted.
    Bound("_dual_ffn_up_kernel", "^384 × .*grouped, (bf16|fp16)", (80,), in_flight=2),
    Bound("_dual_ffn_act_fwd_kernel", MODELS, blocks=6, wide=90),
    # On 9.0 a model's training step takes the grouped products' epilogue in its place.
    Bound("_dual_ffn_act_bwd_kernel", MODELS, (80, 86, 89, 100, 120), blocks=6, wide=90),
    Bound("_dual_ffn_up_kernel", MODELS, (90,), blocks=2, wide=85, waves=1.0, products=("bf16",)),
    # What only moves memory needs many warps, and accesses as wide as they come.
    Bound("_add_layer_norm_fwd_kernel", MODELS, blocks=12, wide=70, filled=1.0),
    Bound("_add_layer_norm_bwd_kernel", MODELS, blocks=5, wide=80),
    Bound("_tape_gather_fwd_kernel", MODELS, blocks=16, wide=65, filled=1.0),
    Bound("_tape_gather_bwd_kernel", MODELS, blocks=16, wide=55),
    Bound("_segment_sum_own_kernel", MODELS, blocks=7, wide=55, filled=1.0),
    Bound("_segment_sum_shared_kernel", MODELS, blocks=16, wide=50, filled=1.0),
    Bound("_add_parts_kernel", MODELS, blocks=16, wide=80, filled=1.0),
    # A program for each of 256 examples: all of them at once where a chip has 128 multiprocessors,
    # and two programs on each.
    Bound("_tape_select_fwd_own_kernel", MODELS, blocks=2, wide=75),
    Bound("_tape_select_fwd_own_kernel", MODELS, (90, 100, 120), waves=1.0),
    # Tiles of a shared bank are spread over every multiprocessor.
    Bound(
        "_tape_select_fwd_score_kernel",
        MODELS,
        in_flight=2,
        wide=75,
        filled=1.0,
        products=("bf16",),
    ),
    Bound("_tape_select_fwd_merge_kernel", MODELS, blocks=8, waves=1.0),
    Bound("_tape_select_bwd_kernel", MODELS, blocks=4, wide=50),
    Bound("_tape_select_bwd_kernel", MODELS, (80, 90, 100, 120), waves=1.0),
)
"""Of Triton's kernels."""

NVCC_BOUNDS = (
    *(
        Bound(f"elastic_attention_{way}_kernel", dtype, wide=60, products=factors)
        for way in ("fwd", "bwd")
        for dtype, factors in (("bfloat16", ("bf16",)), ("half", ("fp16",)))
    ),
    Bound("tape_select_kernel", blocks=2, in_flight=1),
    Bound("segment_sum_kernel", "true", wide=45),
)
"""Of the kernels in csrc/cuda, whose cases are their template's arguments."""
