"""The four ops, one a file: `torch.ops.adatape.*` with fakes, autograd and several backends."""

from adatape_kernels.ops.dual_ffn import dual_ffn
from adatape_kernels.ops.elastic_attention import elastic_attention
from adatape_kernels.ops.tape_gather import tape_gather
from adatape_kernels.ops.tape_select import tape_select
from adatape_kernels.reference import FFN, TapeSelection

__all__ = ["FFN", "TapeSelection", "dual_ffn", "elastic_attention", "tape_gather", "tape_select"]
