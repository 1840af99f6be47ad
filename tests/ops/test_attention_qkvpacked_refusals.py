"""What `elastic_attention_qkvpacked` refuses."""

import pytest
import torch
from attention_cases import not_served
from checks import cannot_raise, refused

from adatape_kernels.ops import elastic_attention_qkvpacked, varlen_attention_qkvpacked

OP, DTYPE = "elastic_attention_qkvpacked", {"cuda": torch.float16}
pytestmark = pytest.mark.absent_if(reason=not_served)

GOOD = dict(
    qkv=torch.zeros(6, 3, 2, 4),
    cu_inputs=torch.tensor([0, 3, 4]),
    cu_tapes=torch.tensor([4, 4, 6]),
)


@pytest.mark.no_backend
@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("qkv", torch.zeros(6, 3, 8), ["bits (rows, 3, num_heads, head_dim)", "(6, 3, 8)"]),
        ("qkv", torch.zeros(6, 2, 2, 4), ["bits (rows, 3, num_heads, head_dim)", "(6, 2, 2, 4)"]),
        (
            "qkv",
            torch.zeros(6, 3, 2, 0),
            ["16 to 64 bits", "head_dim at least 1", "(6, 3, 2, 0)"],
        ),
        ("qkv", torch.zeros(6, 3, 2, 4, dtype=torch.int32), ["floating-point", "int32"]),
        ("cu_inputs", torch.zeros(1, 3, dtype=torch.int32), ["(batch + 1,)", "(1, 3)"]),
        ("cu_tapes", torch.tensor([4, 6]), ["(3,)", "(2,)"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        elastic_attention_qkvpacked(**{**GOOD, argument: value})


@pytest.mark.no_backend
def test_other_types_are_refused():
    with refused("qkv", "a tensor", error=TypeError):
        elastic_attention_qkvpacked(**{**GOOD, "qkv": [1.0]})
    with refused("max_rows", "int", error=TypeError):
        elastic_attention_qkvpacked(**GOOD, max_rows=2.5)
    with refused("cu_seqlens", "(batch + 1,)"):
        varlen_attention_qkvpacked(GOOD["qkv"], torch.zeros(1, 3, dtype=torch.int32))


@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.runs_no_op
def test_bad_values_are_refused(device):
    qkv = torch.randn(6, 3, 2, 8)
    with refused("cu_inputs", "ascending"):
        elastic_attention_qkvpacked(qkv, torch.tensor([0, 5, 4]), torch.tensor([4, 4, 6]))
    with refused("max_rows", "at least 3"):
        elastic_attention_qkvpacked(qkv, GOOD["cu_inputs"], GOOD["cu_tapes"], max_rows=2)


@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.runs_no_op
def test_a_gradient_whose_offsets_are_none_is_refused(device):
    qkv, out = torch.randn(6, 3, 2, 8), torch.randn(6, 2, 8)
    descending, cu_tapes = torch.tensor([[0, 5, 4], [4, 4, 6]], dtype=torch.int32).unbind(0)
    lse = torch.randn(2, 6)
    with refused("cu_inputs", "ascending"):
        torch.ops.adatape.elastic_attention_qkvpacked_bwd(
            out, qkv, out, lse, descending, cu_tapes, None, None
        )
