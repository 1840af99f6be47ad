"""Calls that go past the op, and those that do not: adatape_kernels/ops/direct_call.py."""

import contextlib
import dataclasses

import pytest
import torch
from small_calls import call_of
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels import ops, use_backend
from adatape_kernels.ops.op import Ran, operation, record, why_absent

pytestmark = [
    pytest.mark.runs_no_op,  # the backend is what these tests choose
    pytest.mark.skipif(why_absent("cpp") is not None, reason="there are no kernels of csrc/cpu"),
]

NAMES = [
    "tape_select",
    "tape_gather",
    "tape_read",
    "elastic_attention",
    "elastic_attention_qkvpacked",
    "dual_ffn",
    "add_layer_norm",
    "compact_rows",
    "accumulate_rows",
]
READ = {"num_tape_tokens": 3, "topk": 2, "halt_threshold": 1.0}


def made(op, *, gradients=False, dtype=torch.float32):
    """Return the arguments of a call of the op, as the dispatcher takes them."""
    if op == "tape_read":
        query, keys, *options = call_of("tape_select", dtype)
        args = [query, torch.cat([keys, keys], -1), *options, 6]
    else:
        args = call_of(op, dtype)
    if op == "dual_ffn":
        args[3] = None  # the public function gives numbers of rows on the host without bounds
    return [
        x.requires_grad_(gradients) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    ]


def at_once(op):
    if op == "tape_read":
        from adatape_kernels.ops.composition import compositions

        return next(each for each in compositions() if each.name == op).at_once
    return operation(op).at_once


def through_dispatcher(op, args):
    return getattr(torch.ops.adatape, op).default(*args)


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_results_and_gradients_are_those_of_the_dispatcher(op, gradients, dtype):
    args = made(op, gradients=gradients, dtype=dtype)
    with record() as expected_ran:
        expected = as_tuple(through_dispatcher(op, args))
    with record() as ran:
        found = as_tuple(at_once(op)(*args))
    assert found != (None,) and ran == expected_ran
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
        assert type(one.grad_fn) is type(other.grad_fn)
    if gradients:
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        both = []
        for results in (found, expected):
            total = sum(y.float().sum() for y in results if y.requires_grad)
            both.append(torch.autograd.grad(total, leaves, allow_unused=True))
        for one, other in zip(*both, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, called, types, args=(), kwargs=None):
        return called(*args, **(kwargs or {}))


@contextlib.contextmanager
def inside_vmap():
    """The state of a thread inside `torch.func.vmap`, without mapped tensors."""
    with torch._functorch.vmap.vmap_increment_nesting(1, "error"):
        yield


@pytest.mark.parametrize(
    "around",
    [
        _Watching,
        lambda: torch.device("cpu"),  # a mode of torch functions
        torch.profiler.profile,
        forward_ad.dual_level,
        inside_vmap,
        lambda: torch.autocast("cpu", torch.bfloat16),  # somebody may have a rule for the op
        lambda: use_backend("eager"),
    ],
    ids=["dispatch mode", "function mode", "profiler", "forward mode", "vmap", "autocast", "eager"],
)
@pytest.mark.parametrize("op", ["tape_read", "add_layer_norm"])
def test_whoever_may_see_a_call_sees_it(op, around):
    args = made(op)
    through_dispatcher(op, args)
    assert at_once(op)(*args) is not None
    with around():
        assert at_once(op)(*args) is None
    assert at_once(op)(*args) is not None


def test_a_rule_of_autocast_is_followed():
    args = made("add_layer_norm")
    through_dispatcher("add_layer_norm", args)
    library = torch.library.Library("adatape", "FRAGMENT")
    try:
        torch.library.register_autocast(
            "adatape::add_layer_norm", "cpu", torch.bfloat16, lib=library
        )
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = ops.add_layer_norm(*args)
    finally:
        library._destroy()
    assert total.dtype == torch.bfloat16


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x.as_subclass(_Subclass),
        lambda x: x.to("meta"),
        lambda x: x.double(),
        lambda x: x.to_sparse(),
        lambda x: None,
        lambda x: x[0, 0].item(),
    ],
    ids=["subclass", "meta", "double", "sparse", "none", "number"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_other_arguments_go_through_the_dispatcher(changed, place):
    args = made("add_layer_norm")
    through_dispatcher("add_layer_norm", args)
    args[place] = changed(args[place])
    if place == 1 and args[1] is not None and getattr(args[1], "dtype", None) == torch.float64:
        return  # a branch may have it
    assert at_once("add_layer_norm")(*args) is None


@pytest.mark.parametrize("value", [True, 1.0, torch.tensor(1)])
def test_what_is_no_plain_number_is_refused_as_ever(value):
    query, keys = torch.randn(2, 4), torch.randn(2, 5, 4)
    ops.tape_select(query, keys, **READ)
    with pytest.raises(TypeError, match=r"^topk: expected an int, got "):
        ops.tape_select(query, keys, **{**READ, "topk": value})


def test_a_kernel_s_refusal_becomes_that_of_the_public_function():
    q = torch.randn(4, 1, 8, requires_grad=True)
    good, bad = torch.tensor([0, 4]).int(), torch.tensor([0, 5]).int()
    tapes = torch.tensor([4, 4]).int()
    ops.elastic_attention(q, q, q, good, tapes)
    for k in (q[:3], q.double()):
        with pytest.raises(ValueError, match=r"^k: expected .* like q, got "):
            ops.elastic_attention(q, k, q, good, tapes)
    with pytest.raises(ValueError, match="cu_inputs: expected the last offset to be at most 4"):
        ops.elastic_attention(q, q, q, bad, tapes)


def test_int64_offsets_are_no_matter_of_the_kernel():
    args = made("compact_rows")
    through_dispatcher("compact_rows", args)
    args[2] = args[2].long()
    assert at_once("compact_rows")(*args) is None
    assert torch.equal(ops.compact_rows(*args[:4])[0], args[0][args[1]][:4])


def test_a_hook_s_own_error_is_not_mistaken_for_the_kernel_s():
    args, packed = made("add_layer_norm", gradients=True), []

    def pack(x):
        packed.append(x)
        raise RuntimeError("no room")

    through_dispatcher("add_layer_norm", args)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, pytest.raises(RuntimeError, match="no room"):
        ops.add_layer_norm(*args)
    assert len(packed) == 1


def test_below_autograd_nothing_is_recorded():
    """As inside the kernel of somebody else's op, where gradients are on but not for this op."""
    args = made("add_layer_norm", gradients=True)
    through_dispatcher("add_layer_norm", args)
    with torch._C._AutoDispatchBelowAutograd():
        total, normed = ops.add_layer_norm(*args)
    assert not total.requires_grad and not normed.requires_grad


def test_a_tensor_of_a_transform_that_has_ended_keeps_its_gradient():
    leaked, x = [], torch.randn(3, 8, requires_grad=True)

    def function(y):
        leaked.append(y * 1)
        return y.sum()

    torch.func.grad(function)(x)
    args = made("add_layer_norm")
    args[0] = args[1] = torch.randn(3, 8)
    through_dispatcher("add_layer_norm", args)
    args[0] = leaked[0]
    expected = through_dispatcher("add_layer_norm", args)[0].requires_grad
    assert ops.add_layer_norm(*args)[0].requires_grad == expected


@pytest.mark.parametrize("op", NAMES)
def test_a_kernel_refuses_a_tensor_of_a_transform_that_has_ended(op):
    """Where it requires no gradient but what it wraps does, which only the op's derivative sees."""
    args, leaked = made(op), []
    through_dispatcher(op, args)
    x = args[0].clone().requires_grad_()

    def function(y):
        leaked.append(y * 1)
        return y.sum()

    torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert not leaked[0].requires_grad
    args[0] = leaked[0]
    assert at_once(op)(*args) is None


OFFSETS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
HEADS = 2, 8


def sequences(function, *, gradients=False):
    """The arguments of attention over sequences, and what makes a call of them."""
    shape = (7, *HEADS) if function is not ops.varlen_attention_qkvpacked else (7, 3, *HEADS)
    count = 1 if function is ops.varlen_attention_qkvpacked else 3
    torch.manual_seed(0)
    tensors = [torch.randn(shape).requires_grad_(gradients) for _ in range(count)]
    if function is ops.varlen_attn:
        return tensors, lambda cu: function(*tensors, cu, cu, 4, 4)
    return tensors, lambda cu: function(*tensors, cu, 4)


SEQUENCES = [ops.varlen_attention, ops.varlen_attention_qkvpacked, ops.varlen_attn]


@pytest.mark.parametrize("function", SEQUENCES)
def test_sequences_without_tapes_give_what_the_op_gives(function):
    """Offsets of 64 bits go through the op, others to a kernel that needs no bounds of tapes."""
    found = {}
    for cu in (OFFSETS.long(), OFFSETS):
        tensors, call = sequences(function, gradients=True)
        call(cu)
        with record() as ran:
            out = call(cu)
        saved = out.grad_fn.saved_tensors
        out.sum().backward()
        found[cu.dtype] = out, [x.grad for x in tensors], ran, type(out.grad_fn), saved[-1] is None
    for one, other in zip(*(each[:2] for each in found.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert found[torch.int32][2:4] == found[torch.int64][2:4]
    assert [each[4] for each in found.values()] == [False, True]


@pytest.mark.parametrize("function", SEQUENCES)
def test_sequences_without_tapes_are_differentiated_twice(function):
    tensors, call = sequences(function, gradients=True)

    def second_derivatives():
        first = torch.autograd.grad(call(OFFSETS).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    call(OFFSETS)
    found = second_derivatives()
    tensors[:] = [x.detach().double().requires_grad_() for x in tensors]
    for one, other in zip(found, second_derivatives(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("function", SEQUENCES)
def test_sequences_that_do_not_fit_are_refused_by_name(function):
    _, call = sequences(function)
    name = "cu_seq_q" if function is ops.varlen_attn else "cu_seqlens"
    for wrong in (OFFSETS.flip(0), OFFSETS + 1, OFFSETS[:0], OFFSETS.float()):
        with pytest.raises(ValueError, match=rf"^([a-z_]+: )?{name}: expected "):
            call(wrong)


@pytest.mark.parametrize("op", ["varlen_attention", "varlen_attention_qkvpacked"])
def test_a_kernel_without_tapes_refuses_what_are_no_offsets(op):
    kernel = getattr(torch.ops.adatape_cpu, op)
    tensors = (
        [torch.randn(7, *HEADS)] * 3 if op == "varlen_attention" else [torch.randn(7, 3, 2, 8)]
    )
    assert torch.equal(
        kernel(*tensors, OFFSETS, None, None, None)[0],
        kernel(*tensors, OFFSETS, torch.full_like(OFFSETS, 7), None, None)[0],
    )
    for wrong in (OFFSETS.long(), OFFSETS[:0], OFFSETS.view(2, 2)):
        with pytest.raises(RuntimeError, match="cu_inputs: expected int32"):
            kernel(*tensors, wrong, None, None, None)


def test_a_composition_needs_its_parts_to_be_served_by_cpp(eager_only):
    args = made("tape_read")
    with record() as ran:
        ops.tape_read(*args[:2], **READ)
        ops.tape_read(*args[:2], **READ)
    assert ran == [Ran(name, "eager") for name in ("tape_select", "tape_gather")] * 2


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_reading_copies_no_slice_of_the_bank(own):
    """Keys that are a slice are read where they lie, so that a large bank costs no memory."""
    batch, size, dim = 2, 4096, 512
    query = torch.randn(batch, 8)
    bank = torch.randn(*([batch] if own else []), size, dim)
    read = ops.tape_read(query, bank, **READ)
    apart = ops.tape_select(query, bank[..., :8].contiguous(), **READ)
    assert torch.equal(read[2].indices, apart.indices)
    assert torch.equal(read[2].weights, apart.weights)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.adatape_cpu.tape_read(query, bank, 3, 2, 1.0, True, "entropy", None, None, 6)
    copied = [each for each in profile.events() if each.name in ("aten::contiguous", "aten::clone")]
    assert not copied


def test_a_statement_that_reads_what_nobody_checked_leaves_the_call_to_the_op(monkeypatch):
    found = operation("add_layer_norm")
    stating = dataclasses.replace(
        found.implementations["cpp"],
        limits=lambda device, x, *rest: "no" if x.shape[1] == 3 else None,
    )
    monkeypatch.setitem(found.implementations, "cpp", stating)
    found.replace("cpp", stating)
    args = made("add_layer_norm")
    try:
        through_dispatcher("add_layer_norm", args)
        assert at_once("add_layer_norm")(*args) is not None
        for x in (args[0][0], args[0].sum()):
            assert at_once("add_layer_norm")(x, *args[1:]) is None
            with pytest.raises(ValueError, match=r"^x: expected"):
                ops.add_layer_norm(x, *args[1:])
    finally:
        monkeypatch.undo()
        found.replace("cpp", found.implementations["cpp"])
