"""The ops, a room each: `torch.ops.adatape.*` with fakes, autograd and several backends."""

from adatape_kernels.op_types import FFN, TapeSelection
from adatape_kernels.ops.accumulate_rows import accumulate_rows, accumulate_rows_
from adatape_kernels.ops.add_layer_norm import add_layer_norm
from adatape_kernels.ops.compact_rows import compact_rows
from adatape_kernels.ops.dual_ffn import dual_ffn
from adatape_kernels.ops.dual_ffn.products import FFN_PRODUCTS, ffn_products
from adatape_kernels.ops.elastic_attention import elastic_attention
from adatape_kernels.ops.elastic_attention.qkvpacked import elastic_attention_qkvpacked
from adatape_kernels.ops.tape_gather import tape_gather
from adatape_kernels.ops.tape_read import tape_read
from adatape_kernels.ops.tape_select import tape_select
from adatape_kernels.ops.varlen_attention import (
    varlen_attention,
    varlen_attention_qkvpacked,
    varlen_attn,
)

__all__ = [
    "FFN",
    "FFN_PRODUCTS",
    "TapeSelection",
    "accumulate_rows",
    "accumulate_rows_",
    "add_layer_norm",
    "compact_rows",
    "dual_ffn",
    "elastic_attention",
    "elastic_attention_qkvpacked",
    "ffn_products",
    "tape_gather",
    "tape_read",
    "tape_select",
    "varlen_attention",
    "varlen_attention_qkvpacked",
    "varlen_attn",
]
