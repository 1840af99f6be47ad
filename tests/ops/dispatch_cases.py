"""Calls for the tests of the dispatcher, and other implementations for a while."""

import torch

from adatape_kernels.ops import tape_select
from adatape_kernels.ops.op import Ran

OPS = (
    "tape_select",
    "tape_gather",
    "elastic_attention",
    "elastic_attention_qkvpacked",
    "dual_ffn",
    "add_layer_norm",
    "compact_rows",
    "accumulate_rows",
)
WITH_BACKWARDS = [f"{op}{direction}" for op in OPS for direction in ("", "_bwd")]
IN_PLACE = ["accumulate_rows_"]


def select(query, keys):
    return tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0)


def given():
    return torch.randn(3, 4), torch.randn(5, 4)


def only(op, *backends):
    return [Ran(op, backend) for backend in backends]
