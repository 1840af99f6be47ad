"""What an op is, who serves a call by default, and what ran: adatape_kernels/ops/op.py."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from checks import refused
from dispatch_cases import IN_PLACE, WITH_BACKWARDS, given, only, select

import adatape_kernels
from adatape_kernels import use_backend
from adatape_kernels.ops import (
    FFN,
    accumulate_rows,
    add_layer_norm,
    compact_rows,
    dual_ffn,
    elastic_attention,
    elastic_attention_qkvpacked,
    tape_gather,
    tape_read,
    tape_select,
)
from adatape_kernels.ops import op as dispatcher
from adatape_kernels.ops.implementation import FLOAT_DTYPES, Implementation
from adatape_kernels.ops.op import (
    BACKENDS,
    NotServed,
    Ran,
    explain,
    operation,
    record,
    registered_ops,
    serving,
    why_absent,
)


def test_every_op_and_its_backward_has_the_eager_reference_everywhere():
    assert set(registered_ops()) == {*WITH_BACKWARDS, *IN_PLACE, "tape_read_bwd"}
    for op in registered_ops():
        for device in ("cpu", "cuda", "xpu"):
            for dtype in FLOAT_DTYPES:
                assert explain(op, device, dtype)["eager"] == "serves"
                assert list(explain(op, device, dtype)) == list(BACKENDS)


def test_an_op_is_found_by_its_name():
    assert operation("tape_select").name == "tape_select"
    assert operation("tape_select").schema.startswith("tape_select(Tensor query, Tensor keys,")
    with pytest.raises(KeyError):
        operation("tape_read")  # a composition, which no backend serves


def test_an_op_states_it_for_its_backends(replaced):
    replaced("cuda", devices=("cuda",))
    query, keys = given()
    args = query, keys, 2, 2, 1.0, True, "entropy", None, None
    op = operation("tape_select")
    assert op.refusal("eager", args) is None
    assert op.refusal("cuda", args) == "it runs on cuda"
    assert op.refusal("cuda", args, "cuda") is None
    assert op.refusal("triton", args) == "there is no such kernel"
    assert op.serving(args) == "eager" and op.serving(args, "cuda") == "cuda"
    assert explain("tape_select", "cpu", torch.float32) == {
        "eager": "serves",
        "cpp": "there is no such kernel",
        "triton": "there is no such kernel",
        "cuda": "it runs on cuda",
    }


@pytest.mark.parametrize("op", registered_ops())
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_typical_calls_are_calls_of_the_op(op, dtype):
    """Eager has no limits and any device, so the fake takes what the statements are asked about."""
    found = operation(op)
    for make in found.typical.values():
        args = make(dtype)
        assert args[0].dtype == dtype and args[0].device.type == "meta"
        assert found.refusal("eager", args) is None
        if op == "tape_gather":  # without a capacity the number of rows is data, which meta has not
            args = (*args[:-1], 17)
        results = found.fake(*args)
        assert all(result.device.type == "meta" for result in ([] if results is None else results))
        assert len(args) == len(found.overload._schema.arguments)
        found.overload(*args)


def test_the_default_is_the_first_in_the_device_s_order_that_serves(replaced):
    replaced("cpp", dtypes=(torch.float32,), devices=("cpu",))
    query, keys = given()
    assert serving("tape_select", "cpu", torch.float32) == "cpp"
    assert serving("tape_select", "cpu", torch.float64) == "eager"
    assert serving("tape_select", "cuda", torch.float32) == "eager"
    assert serving("tape_gather", "cpu", torch.float32) == "eager"
    with record() as ran:
        select(query, keys)
        select(query.double(), keys.double())
        with use_backend("eager"):
            select(query, keys)
            with use_backend(None):
                select(query, keys)
    assert ran == only("tape_select", "cpp", "eager", "eager", "cpp")


def test_limits_are_asked_at_every_call(replaced):
    def short(device, query, *rest):
        return None if len(query) < 3 else "it takes two examples"

    replaced("cpp", limits=short)
    query, keys = given()
    with record() as ran:
        select(query, keys)
        select(query[:2], keys)
        with use_backend("cpp"):
            select(query[:2], keys)
            with pytest.raises(NotServed, match="cpp: it takes two examples"):
                select(query, keys)
    assert ran == only("tape_select", "eager", "cpp", "cpp")


@pytest.mark.parametrize(
    ("device", "order"), [("cpu", "cpp eager"), ("cuda", "triton cuda eager"), ("xpu", "eager")]
)
def test_each_device_has_an_order(device, order):
    assert dispatcher.backend_order(device) == tuple(order.split())


def test_a_backend_outside_the_order_serves_when_forced_and_only_then(replaced):
    replaced("triton")  # not among the CPU's own choices
    query, keys = given()
    with record() as ran:
        expected = select(query, keys)
        with use_backend("triton"):
            actual = select(query, keys)
        select(query, keys)
    assert ran == only("tape_select", "eager", "triton", "eager")
    assert torch.equal(actual.weights, expected.weights)


def test_all_ops_run_on_the_forced_backend(replaced):
    replaced("cuda", ops=WITH_BACKWARDS)
    x = torch.randn(6, 4, requires_grad=True)
    offsets = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 6], dtype=torch.int32)
    ffn = FFN(torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4))
    with use_backend("cuda"), record() as ran:
        sel = select(x, x)
        tape, _ = tape_gather(x, sel.indices, sel.weights, sel.counts)
        heads = x.view(6, 2, 2)
        out = elastic_attention(heads, heads, heads, *offsets)
        packed = heads.unsqueeze(1).expand(-1, 3, -1, -1)
        out = out + elastic_attention_qkvpacked(packed, *offsets)
        _, normed = add_layer_norm(x, x, ffn.b2, ffn.b2)
        kept, _, _, source = compact_rows(x, torch.ones(6, dtype=torch.bool), *offsets)
        total = accumulate_rows(x, kept, source, torch.ones(6))
        parts = tape, out, dual_ffn(x, 4, ffn), normed, total
        sum(part.sum() for part in parts).backward()
    assert sorted(ran) == sorted(Ran(op, "cuda") for op in WITH_BACKWARDS)


def test_a_record_holds_what_every_thread_ran(replaced):
    replaced("triton")

    def other():
        with use_backend("triton"):
            select(*given())

    with record() as ran:
        select(*given())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    select(*given())
    assert ran == only("tape_select", "eager", "triton")


def test_records_nest_and_end_in_any_order():
    with record() as outer:
        with record() as inner:
            select(*given())
        select(*given())
    assert inner == only("tape_select", "eager" if why_absent("cpp") else "cpp") and len(outer) == 2
    assert dispatcher._recorders == []
    first, second = record(), record()
    ran = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)  # of two that hold the same, the first one ends
    select(*given())
    second.__exit__(None, None, None)
    assert [*map(len, ran)] == [0, 1] and dispatcher._recorders == []


def test_a_call_that_is_refused_is_in_no_record_of_what_ran(replaced):
    replaced("cuda", devices=("cuda",))
    with record() as ran, use_backend("cuda"), pytest.raises(NotServed):
        select(*given())
    assert ran == []


def test_a_composition_is_recorded_as_the_ops_that_it_calls(eager_only):
    query, bank = torch.randn(3, 4, requires_grad=True), torch.randn(3, 5, 4)
    with record() as ran:
        tape, _, _ = tape_read(query, bank, num_tape_tokens=2, topk=2, halt_threshold=1.0)
        tape.sum().backward()
    names = ("tape_select", "tape_gather", "tape_read_bwd")
    assert ran == [Ran(name, "eager") for name in names]


@pytest.mark.compiles
def test_a_compiled_graph_takes_the_backend_around_its_call(fresh_compiler, replaced):
    """The choice is made, and recorded, when the graph runs."""
    replaced("triton")
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    query, keys = given()
    with record() as ran:
        expected = compiled(query, keys)
        with use_backend("triton"):
            actual = compiled(query, keys)
        compiled(query, keys)
    assert ran == only("tape_select", "eager", "triton", "eager")
    assert torch.equal(actual.weights, expected.weights)


def test_the_backward_takes_the_backend_around_its_call(replaced):
    replaced("triton")
    query, keys = given()
    weights = select(query.requires_grad_(), keys).weights
    with use_backend("triton"), record() as ran:
        weights.sum().backward()
    assert ran == only("tape_select_bwd", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_backward_otherwise_takes_its_forward_s_with_the_fallback(replaced, dtype):
    """On a thread of its own, as autograd has them for a GPU."""
    replaced("triton", dtypes=(torch.float32,))
    query, keys = (x.to(dtype) for x in given())
    with use_backend("triton", fallback="eager"):
        weights = select(query.requires_grad_(), keys).weights
    thread = threading.Thread(target=lambda: weights.sum().backward())
    with record() as ran:
        thread.start()
        thread.join()
    assert ran == only("tape_select_bwd", "triton" if dtype == torch.float32 else "eager")


@pytest.mark.parametrize("checks_values", [False, True])
def test_the_dispatcher_looks_at_values_for_those_that_do_not(eager_only, checks_values):
    def run(query, keys, *options):
        return eager.function(query, keys, *options[:-1], None)

    op, eager = operation("tape_select"), operation("tape_select").implementations["eager"]
    op.replace("cpp", dataclasses.replace(eager, function=run, checks_values=checks_values))
    query, keys = given()
    options = dict(num_tape_tokens=2, topk=2, halt_threshold=1.0)
    lens = torch.tensor([5, 6, 0])
    with contextlib.nullcontext() if checks_values else refused("bank_lens", "0 to 5", "6"):
        tape_select(query, keys, bank_lens=lens, **options)


def test_nobody_copies_values_from_another_device(eager_only):
    """Tensors without data stand in for a GPU's: to look at a value of theirs is an error."""
    op = operation("tape_select")
    op.replace("eager", Implementation(lambda *args: op.fake(*args)))
    query, keys = (x.to("meta") for x in given())
    lens = torch.ones(3, dtype=torch.int32, device="meta")
    sel = tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0, bank_lens=lens)
    assert sel.counts.shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        op.check_values(query, keys, lens)


def test_ops_infer_shapes_on_the_meta_device():
    """So a model can be built and its shapes worked out without memory."""
    with torch.device("meta"):
        sel = select(torch.zeros(3, 4), torch.zeros(3, 9, 4))
        assert sel.weights.shape == sel.indices.shape == (3, 2, 2)
        tape, offsets = tape_gather(
            torch.zeros(3, 9, 8), sel.indices, sel.weights, sel.counts, capacity=5
        )
        assert tape.shape == (5, 8) and offsets.shape == (4,)
        q, cu = torch.zeros(6, 2, 4), torch.zeros(3, dtype=torch.int32)
        assert elastic_attention(q, q, q, cu, cu).shape == (6, 2, 4)
        ffn = FFN(torch.zeros(8, 4), torch.zeros(8), torch.zeros(4, 8), torch.zeros(4))
        assert dual_ffn(torch.zeros(6, 4), 3, ffn).device.type == "meta"


def test_the_package_offers_its_public_names():
    for name in adatape_kernels.__all__:
        assert hasattr(adatape_kernels, name)
    for name in adatape_kernels.ops.__all__:
        assert hasattr(adatape_kernels.ops, name)
