"""One compiled form of every Triton kernel serves all batches, and tensors wherever they lie."""

import random

import pytest
import small_calls
import torch
from test_strides_of_calls import VIEWS, expanded_columns, negated

from adatape_kernels.ops import FFN_PRODUCTS, ffn_products, triton_runtime
from adatape_kernels.ops.op import operation
from adatape_kernels.ops.triton_specialization import (
    compiled_for,
    dense,
    elements_per_access,
    in_whole_accesses,
    with_dense_rows,
)

pytest.importorskip("triton")
from compiled_forms import forms_of

OPS = [op for op in small_calls.OPS if "triton" in operation(op).implementations]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launcher(op):
    return operation(op).implementations["triton"].function


def reading(batch, dtype):
    """Selects from and gathers an own bank and a shared one, both ways."""
    counts = torch.empty(batch, dtype=torch.int32)
    for keys_shape, bank_shape in (((batch, 50, 32), (batch, 50, 48)), ((500, 32), (500, 48))):
        query, keys = torch.empty(batch, 32, dtype=dtype), torch.empty(keys_shape, dtype=dtype)
        options = (6, 5, 2.0, True, "entropy", None, None)
        weights, ponder, indices, _ = launcher("tape_select")(query, keys, *options)
        launcher("tape_select_bwd")(query, keys, weights, ponder, indices, counts, True, "entropy")
        bank = torch.empty(bank_shape, dtype=dtype)
        tape, _ = launcher("tape_gather")(bank, indices, weights, counts, random.randint(1, 300))
        launcher("tape_gather_bwd")(tape, bank, indices, weights, counts)


def layers(batch, dtype):
    """Goes through what a block of the model does with its rows."""
    inputs, tapes, unused = random.randint(1, 500), random.randint(1, 90), random.randint(0, 9)
    rows, dim = inputs + tapes + unused, 48
    q, k, v = torch.empty(rows, 3, 2, 24, dtype=dtype).unbind(1)
    offsets = torch.empty(2, batch + 1, dtype=torch.int32).unbind(0)
    out, lse = launcher("elastic_attention")(q, k, v, *offsets, 200, None)
    launcher("elastic_attention_bwd")(q, q, k, v, out, lse, *offsets, 200, None)
    x, weight = torch.empty(rows, dim, dtype=dtype), torch.empty(dim, dtype=dtype)
    total, normed, *saved = launcher("add_layer_norm")(x, x, weight, weight, 1e-6)
    launcher("add_layer_norm_bwd")(total, normed, total, weight, *saved)
    shapes = (96, dim), (96,), (dim, 96), (dim,), (64, dim), (64,), (dim, 32), (dim,)
    parameters = [torch.empty(shape, dtype=dtype) for shape in shapes]
    bounds = torch.empty(2, dtype=torch.int64)
    for products in FFN_PRODUCTS:
        with ffn_products(products):
            given = bounds, "gelu", *parameters
            y, *saved = launcher("dual_ffn")(x, inputs, tapes + unused, *given)
            launcher("dual_ffn_bwd")(y, x, *saved, inputs, *given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [reading, layers])
def test_ragged_batches_compile_nothing_after_the_first(step, dtype):
    """Not even a batch of one example, of one row, or of multiples of 16."""
    random.seed(0)
    known = None
    for batch in (7, 1, 16, *(random.randint(1, 100) for _ in range(48))):
        with triton_runtime.recording() as launches, torch.device("meta"):
            step(batch, dtype)
        found = forms_of(launches)
        known = found if known is None else known
        assert found <= known, found - known


@pytest.mark.parametrize("view", [view for view in VIEWS if view is not negated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_a_view_needs_no_other_form(op, dtype, view):
    """So the bits cannot follow where a tensor lies: the same code adds up the same blocks."""
    for own_banks in (True, False) if "tape" in op else (True,):
        args = small_calls.call_of(op, dtype, own_banks=own_banks)
        for place, given in enumerate(args):
            if not isinstance(given, torch.Tensor):
                continue
            if op == "accumulate_rows_" and place == 0 and view is expanded_columns:
                continue  # what is written in place has a place for each element
            forms = []
            for x in (given.contiguous(), view(given)):
                with triton_runtime.recording() as launches:
                    launcher(op)(*args[:place], x, *args[place + 1 :])
                forms.append(forms_of(launches))
            assert forms[0] == forms[1], small_calls.names_of(op)[place]


def test_a_kernel_is_compiled_for_what_it_names_alone():
    def example(a_ptr, b_ptr, rows, width, SIZE: triton_runtime.tl.constexpr):
        pass

    kernel = compiled_for(aligned=("a_ptr",), sizes=("width",))(example)
    storage = torch.zeros(9)

    def form(a=0, b=0, rows=3, width=3):
        arguments = dict(a_ptr=storage[a:], b_ptr=storage[b:], rows=rows, width=width, SIZE=1)
        return forms_of([(kernel, (1,), arguments)])

    assert form() == form(b=1) == form(rows=16) == form(rows=1)
    assert len({str(each) for each in (form(), form(a=1), form(width=16), form(width=1))}) == 4


@pytest.mark.parametrize("width", [8, 12, 6])
def test_tensors_are_copied_only_where_they_lie_otherwise(width):
    x = torch.randn(5, width)
    wide, behind = torch.randn(5, width + 1), torch.randn(5 * width + 1)[1:].view(5, width)
    fit = wide[:, :width] if width % 4 else torch.randn(5, width + 4)[:, :width]
    for given in (x, fit, x[:1].expand(5, width)):
        assert with_dense_rows(given) is given
    assert dense(x) is x
    misaligned = [wide[:, 1:], behind, x.repeat(1, 2)[:, ::2]]
    if width % 4 == 0:
        misaligned.append(wide[:, :width])
    for given in misaligned:
        for function in (with_dense_rows, dense, in_whole_accesses):
            copy = function(given)
            assert copy is not given and copy.data_ptr() % 16 == 0
            assert torch.equal(copy[:, :width], given) and copy.stride(1) == 1
            assert function is not in_whole_accesses or elements_per_access(copy) == 4
