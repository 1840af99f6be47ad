"""Batches and outputs move, change dtype and are copied: adatape_kernels/tensor_methods.py."""

import copy
import dataclasses
import io
import pickle
import re

import pytest
import torch
from checks import assert_same_bits, refused
from layout_cases import DIM, make
from torch.func import vmap
from torch.utils import _pytree as pytree

import adatape_kernels as ak
from adatape_kernels import ElasticBatch

OP = None  # no backend: every test runs once a device


def output(device="cpu"):
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_heads": 2, "ffn_dim": 16, "num_tape_tokens": 2, "topk": 2, "depth": 2}
    model = ak.models.adatape_vit("Ti/4", image_size=8, num_classes=5, **sizes).to(device)
    return model(torch.linspace(-1, 1, 3 * 192, device=device).view(3, 3, 8, 8))


def batch_of(device="cpu"):
    return make([2, 0, 3], [1, 2, 0], device, unused=1)[0]


def empty_of(device="cpu"):
    return make([], [], device)[0]


HOLDERS = {"batch": batch_of, "batch without examples": empty_of, "output": output}
CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16}
CASTS = {**CASTS, "float": torch.float32, "double": torch.float64}


def leaves(holder):
    return [x for x in pytree.tree_leaves(holder) if isinstance(x, torch.Tensor)]


def numbers(holder):
    return [x for x in leaves(holder) if not x.is_floating_point()]


def values(holder):
    return [x for x in leaves(holder) if x.is_floating_point()]


def rest(holder):
    return [x for x in pytree.tree_leaves(holder) if not isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_values_alone(device, name, cast):
    holder = HOLDERS[name](device)
    changed = getattr(holder, cast)()
    assert type(changed) is type(holder) and changed.dtype == CASTS[cast]
    for new, old in zip(values(changed), values(holder), strict=True):
        assert new.dtype == CASTS[cast] and torch.equal(new.isnan(), old.isnan())
        assert_same_bits(new.nan_to_num(), old.to(CASTS[cast]).nan_to_num())
    for new, old in zip(numbers(changed), numbers(holder), strict=True):
        assert new.dtype == torch.int32 and torch.equal(new, old)
    assert rest(changed) == rest(holder)
    assert holder.float() is holder


MOVES = {
    "dtype": ((torch.float64,), {}),
    "keyword": ((), {"dtype": torch.float64}),
    "device": (("cpu",), {}),
    "device and dtype": ((torch.device("cpu"), torch.float64), {}),
    "flags": (("cpu", torch.float64, True, True), {}),
    "flags of a dtype": ((torch.float64, False, True), {}),
    "keywords": ((), {"device": "cpu", "dtype": torch.half, "non_blocking": True, "copy": True}),
    "like": ((torch.zeros(1, dtype=torch.float64),), {}),
    "like, copied": ((torch.zeros(1),), {"copy": True}),
    "meta": (("meta",), {}),
    "meta and dtype": (("meta", torch.half), {}),
    "none": ((None, torch.half), {}),
    "Python's": ((float,), {}),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("move", MOVES)
def test_to_takes_what_a_tensor_takes(name, move):
    holder, (args, kwargs) = HOLDERS[name](), MOVES[move]
    moved = holder.to(*args, **kwargs)
    like = torch.zeros(1).to(*args, **kwargs)
    for new, old in zip(leaves(moved), leaves(holder), strict=True):
        assert new.device == like.device and new.shape == old.shape
        assert new.dtype == (like.dtype if old.is_floating_point() else torch.int32)
        if "copy" in kwargs or True in args[1:]:
            assert new is not old
    assert moved.device == like.device and rest(moved) == rest(holder)


@pytest.mark.parametrize("name", HOLDERS)
def test_what_changes_nothing_returns_the_same(name):
    holder = HOLDERS[name]()
    assert holder.to("cpu") is holder.to() is holder.cpu() is holder


@pytest.mark.parametrize("args", [("cpu", "cpu"), ([],), (torch.half, torch.half), ({},)])
def test_to_refuses_in_one_line(args):
    for holder in (batch_of(), output()):
        with refused("to", "as Tensor.to", error=TypeError):
            holder.to(*args)


def test_copies_and_gradients(device):
    for holder in (batch_of(device).requires_grad_(), output(device)):
        copied, detached = holder.clone(), holder.detach()
        for old, new, bare in zip(*map(leaves, (holder, copied, detached)), strict=True):
            assert new.data_ptr() != old.data_ptr() and bare.data_ptr() == old.data_ptr()
            assert new.requires_grad == old.requires_grad and not bare.requires_grad
    batch = batch_of(device).requires_grad_()
    batch.clone().double().half().float().data[:6].sum().backward()
    assert batch.data.grad[:, 0].tolist() == [1] * 6 + [0] * 3
    assert batch.requires_grad_(False) is batch and not batch.data.requires_grad
    with refused("requires_grad", error=TypeError):
        batch.requires_grad_(1)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda holder: pickle.loads(pickle.dumps(holder)),
    "replace": dataclasses.replace,
    "pytree": lambda holder: pytree.tree_map(lambda x: x, holder),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", HOLDERS)
def test_copies_of_python(name, how):
    holder = HOLDERS[name]().detach()
    again = COPIES[how](holder)
    assert type(again) is type(holder) and again is not holder
    for new, old in zip(leaves(again), leaves(holder), strict=True):
        assert_same_bits(new, old)
    assert rest(again) == rest(holder) and len(again) == len(holder)


def test_a_batch_in_a_file_of_torch():
    file = io.BytesIO()
    torch.save(batch_of(), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.lens.tolist() == batch_of().lens.tolist()


def test_a_batch_is_equal_to_itself_alone():
    batch = batch_of()
    assert batch == batch and batch != batch.clone() and batch in {batch}


def test_a_batch_is_described_in_one_line(device):
    batch = batch_of(device)
    text = f"input_rows=5, tape_rows<=4, dim={DIM}, dtype=torch.float32, device='{batch.device}')"
    assert repr(batch) == f"ElasticBatch(examples=3, {text}"
    exact = ElasticBatch.from_padded(torch.zeros(2, 3, 8))
    assert "examples=2, input_rows=6, tape_rows=0, dim=8" in repr(exact)
    for odd in (pytree.tree_map(lambda x: 0, batch), batch.with_data(torch.zeros(9))):
        assert re.fullmatch(r"ElasticBatch\(.*\)", repr(odd))


def test_vmap_over_the_rows_of_a_layout():
    batch = batch_of().with_data(torch.randn(9, DIM))
    stacked = torch.stack([batch.data, 2 * batch.data])
    mapped = vmap(lambda rows: batch.with_data(rows).double().to_padded()[0])(stacked)
    assert_same_bits(mapped[1], 2 * batch.double().to_padded()[0])
    firsts = vmap(lambda rows: batch.with_data(rows)[2].inputs)(stacked)
    assert_same_bits(firsts[1], 2 * batch[2].inputs)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_batch_in_bfloat16_passes_a_layer(backend):
    layer = ak.layers.ElasticEncoderLayer(DIM + 1, 2, 8).bfloat16()
    batch = ElasticBatch.from_padded(torch.randn(2, 3, DIM + 1)).bfloat16()
    if ak.ops.op.why_absent(backend):
        pytest.skip(ak.ops.op.why_absent(backend))
    with ak.use_backend(backend):
        assert layer(batch).dtype == torch.bfloat16


def test_an_output_is_taken_apart():
    whole = output()
    assert len(whole) == 3
    for i, one in enumerate(whole):
        assert torch.equal(one.logits, whole.logits[i]) and one.ponder.shape == (1,)
        assert torch.equal(one.reads[0].indices, whole.reads[0].indices[i])
    some = whole[::2]
    assert len(some) == 2 and torch.equal(some.tape_lens, whole.tape_lens[::2])
    assert torch.equal(whole[-1].logits, whole.logits[2])
    for wrong, error in ((3, IndexError), (True, TypeError), (slice(None, None, -1), ValueError)):
        with refused("index", error=error):
            whole[wrong]
