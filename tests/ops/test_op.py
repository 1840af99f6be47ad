"""What an op and an implementation are, and who serves a call: adatape_kernels/ops/op.py."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from checks import refused

import adatape_kernels
from adatape_kernels import use_backend
from adatape_kernels.ops import (
    FFN,
    add_layer_norm,
    dual_ffn,
    elastic_attention,
    tape_gather,
    tape_read,
    tape_select,
)
from adatape_kernels.ops import op as dispatcher
from adatape_kernels.ops.device_facts import EMULATED, facts_of
from adatape_kernels.ops.op import (
    BACKENDS,
    FLOAT_DTYPES,
    CompiledKernel,
    Implementation,
    NotServed,
    Ran,
    current_backend,
    explain,
    operation,
    record,
    registered_ops,
    serving,
    why_absent,
)

OPS = ("tape_select", "tape_gather", "elastic_attention", "dual_ffn", "add_layer_norm")
WITH_BACKWARDS = [f"{op}{direction}" for op in OPS for direction in ("", "_bwd")]


def select(query, keys):
    return tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0)


def given():
    return torch.randn(3, 4), torch.randn(5, 4)


@pytest.fixture
def restored():
    """Puts every implementation back after the test."""
    before = {name: dict(operation(name).implementations) for name in registered_ops()}
    yield
    for name, found in before.items():
        for backend in BACKENDS:
            operation(name).replace(backend, found.get(backend))


@pytest.fixture
def eager_only(restored):
    for name in registered_ops():
        for backend in BACKENDS[1:]:
            operation(name).replace(backend, None)


@pytest.fixture
def replaced(eager_only):
    """Puts the eager code under another backend's name, with a statement of its own."""

    def replace(backend, *, ops=("tape_select", "tape_select_bwd"), **statement):
        for name in ops:
            eager = operation(name).implementations["eager"]
            operation(name).replace(backend, Implementation(eager.function, **statement))

    return replace


def only(op, *backends):
    return [Ran(op, backend) for backend in backends]


def test_every_op_and_its_backward_has_the_eager_reference_everywhere():
    assert set(registered_ops()) == set(WITH_BACKWARDS)
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


# Statements: which calls an implementation serves


def one(**statement):
    return Implementation(lambda x: x, **statement)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ({}, None),
        (dict(devices=("cpu",)), None),
        (dict(devices=("cuda", "xpu")), "it runs on cuda and xpu"),
        (dict(dtypes=(torch.float16, torch.bfloat16)), "it takes float16, bfloat16"),
        (dict(limits=lambda device, x: None), None),
        (dict(limits=lambda device, x: f"{len(x)} rows on {device.name}"), "3 rows on"),
        (dict(absent="not built"), "not built"),
        (dict(absent="not built", devices=("cuda",)), "not built"),
        (dict(devices=("cuda",), dtypes=(torch.float16,)), "it runs on cuda"),
        (dict(dtypes=(torch.float16,), limits=lambda device, x: "no"), "it takes float16"),
    ],
)
def test_an_implementation_states_why_it_does_not_serve_a_call(statement, reason):
    found = one(**statement).refusal((torch.zeros(3),))
    assert found == reason if reason is None else found.startswith(reason)


def test_a_statement_can_be_asked_about_a_device_that_is_not_here():
    facts = EMULATED._replace(multiprocessors=99)
    limits = one(devices=("cuda",), limits=lambda device, x: f"{device.multiprocessors} of them")
    assert limits.refusal((torch.zeros(3),)) == "it runs on cuda"
    assert limits.refusal((torch.zeros(3),), "cuda") == f"{EMULATED.multiprocessors} of them"
    assert limits.refusal((torch.zeros(3),), "cuda", facts) == "99 of them"
    assert facts_of(torch.device("cpu")) is EMULATED


def test_an_op_states_it_for_its_backends(replaced):
    replaced("cuda", devices=("cuda",))
    query, keys = given()
    args = query, keys, 2, 2, 1.0, True, "entropy", None, None
    op = operation("tape_select")
    assert op.refusal("eager", args) is None
    assert op.refusal("cuda", args) == "it runs on cuda"
    assert op.refusal("cuda", args, "cuda") is None
    assert op.refusal("triton", args) == "tape_select has no such kernel"
    assert op.serving(args) == "eager" and op.serving(args, "cuda") == "cuda"
    assert explain("tape_select", "cpu", torch.float32) == {
        "eager": "serves",
        "cpp": "tape_select has no such kernel",
        "triton": "tape_select has no such kernel",
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
        assert all(result.device.type == "meta" for result in results)
        assert len(args) == len(found.overload._schema.arguments)
        found.overload(*args)


# Order: who serves by default


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
        _, normed = add_layer_norm(x, x, ffn.b2, ffn.b2)
        (tape.sum() + out.sum() + dual_ffn(x, 4, ffn).sum() + normed.sum()).backward()
    assert sorted(ran) == sorted(Ran(op, "cuda") for op in WITH_BACKWARDS)


# Refusals in words, and fallbacks by name


def test_a_backend_without_the_op_device_or_dtype_says_so(replaced):
    replaced("cpp", dtypes=(torch.float32,), devices=("cpu",))
    replaced("cuda", devices=("cuda",))
    query, keys = given()
    with use_backend("cpp"):
        message = refusal(lambda: select(query.double(), keys.double()))
        assert message == (
            "tape_select: cpp cannot serve torch.float64 on cpu (cpp: it takes float32)"
        )
        indices, counts = torch.zeros(1, 1, 1).int(), torch.ones(1).int()
        message = refusal(lambda: tape_gather(keys, indices, torch.ones(1, 1, 1), counts))
        assert message.startswith("tape_gather: cpp cannot serve")
        assert "cpp: tape_gather has no such kernel" in message
    with use_backend("cuda"):
        message = refusal(lambda: select(query, keys))
        assert message.startswith("tape_select: cuda cannot serve torch.float32 on cpu")
        assert "cuda: it runs on cuda" in message


def test_an_absent_implementation_says_why(replaced):
    replaced("cpp", absent="no compiler was found")
    replaced("cpp", ops=("tape_gather",))
    query, keys = given()
    assert why_absent("cpp") is None and serving("tape_select", "cpu", torch.float32) == "eager"
    with use_backend("cpp"):
        assert "cpp: no compiler was found" in refusal(lambda: select(query, keys))


def test_a_dtype_that_no_backend_serves_is_refused():
    query = torch.zeros(2, 4, dtype=torch.float8_e4m3fn)
    message = refusal(lambda: select(query, query))
    assert message.startswith("tape_select: every backend cannot serve torch.float8_e4m3fn on cpu")
    assert "eager: it takes float64, float32, bfloat16, float16" in message


def refusal(run):
    with pytest.raises(NotServed) as info:
        run()
    assert isinstance(info.value, RuntimeError) and "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("fallback", "served"),
    [
        ("eager", "eager"),
        (["cpp", "eager"], "cpp"),
        (("triton", "cpp"), "cpp"),
        (["eager", "cpp"], "eager"),
    ],
)
def test_a_fallback_by_name_serves_what_the_backend_does_not(replaced, fallback, served):
    replaced("cuda", dtypes=(torch.float16,))
    replaced("triton", devices=("cuda",))
    replaced("cpp")
    query, keys = given()
    with use_backend("cuda", fallback=fallback), record() as ran:
        assert current_backend() == "cuda"
        select(query, keys)
        select(query.half(), keys.half())
    assert ran == only("tape_select", served, "cuda")


def test_nobody_else_serves_what_neither_backend_nor_fallback_does(replaced):
    replaced("cuda", dtypes=(torch.float16,))
    replaced("triton", devices=("cuda",))
    query, keys = given()
    with use_backend("cuda", fallback="triton"):
        assert refusal(lambda: select(query, keys)) == (
            "tape_select: cuda and triton cannot serve torch.float32 on cpu "
            "(cuda: it takes float16; triton: it runs on cuda)"
        )


@pytest.mark.parametrize(
    ("name", "fallback"),
    [("numpy", None), ("Eager", None), ("", None), (3, None), ("eager", ["numpy"]), ("eager", [3])],
)
def test_an_unknown_backend_is_refused(name, fallback):
    wrong = repr(next(n for n in (name, *(fallback or ())) if n not in BACKENDS))
    with refused("use_backend", "eager, cpp, triton, cuda", wrong), use_backend(name, fallback):
        raise AssertionError("entered an unknown backend")
    assert current_backend() is None


def test_a_fallback_without_a_backend_is_refused():
    with refused("fallback", "None without a backend", "'eager'"), use_backend(None, "eager"):
        raise AssertionError("entered without a backend")


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("as_fallback", [False, True], ids=["backend", "fallback"])
def test_a_backend_that_is_not_installed_is_refused(eager_only, name, as_fallback):
    operation("tape_select").replace(name, one(absent="it was left out"))
    assert why_absent(name) == "it was left out"
    arguments = ("eager", name) if as_fallback else (name,)
    with pytest.raises(RuntimeError) as info, use_backend(*arguments):
        raise AssertionError("entered an absent backend")
    expected = f"use_backend: backend {name!r} is not available: it was left out"
    assert str(info.value) == expected
    assert current_backend() is None


def test_a_backend_that_no_op_has_is_absent(eager_only):
    assert why_absent("triton") == "no op has such a kernel" and why_absent("eager") is None


# use_backend: nesting, exceptions, threads


def test_use_backend_nests_and_restores():
    assert current_backend() is None
    with use_backend("eager"):
        assert current_backend() == "eager"
        with use_backend(None):
            assert current_backend() is None
            with use_backend("eager"):
                assert current_backend() == "eager"
            assert current_backend() is None
        assert current_backend() == "eager"
    assert current_backend() is None


def test_use_backend_restores_after_an_exception():
    with use_backend("eager"):
        with pytest.raises(KeyError), use_backend(None):
            raise KeyError
        assert current_backend() == "eager"
        with contextlib.suppress(ValueError), use_backend("numpy"):
            raise AssertionError("entered an unknown backend")
        assert current_backend() == "eager"
    assert current_backend() is None


def test_use_backend_is_per_thread():
    seen, entered, left = [], threading.Event(), threading.Event()

    def other():
        seen.append(current_backend())
        with use_backend("eager"):
            entered.set()
            left.wait(10)
            seen.append(current_backend())

    with use_backend("eager"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
    assert current_backend() is None  # while the other thread is still inside its own
    left.set()
    thread.join(10)
    assert seen == [None, "eager"]


# The record of what ran


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
    names = ("tape_select", "tape_gather", "tape_gather_bwd", "tape_select_bwd")
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


# Backward


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


# Checks of values


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
    op.replace("eager", dataclasses.replace(one(), function=lambda *args: op.fake(*args)))
    query, keys = (x.to("meta") for x in given())
    lens = torch.ones(3, dtype=torch.int32, device="meta")
    sel = tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0, bank_lens=lens)
    assert sel.counts.shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        op.check_values(query, keys, lens)


# Kernels in C++


@pytest.fixture
def toy():
    """Lets an op of a library do what the test says; returns the implementation bound to it."""
    library = torch.library.Library("adatape_toy", "FRAGMENT")
    kernel = CompiledKernel(
        "adatape_toy", ("cpu",), (torch.float32,), None, flags={"ordered": lambda: True}
    )
    bound = kernel.bind("toy", "toy(Tensor x) -> Tensor", library)

    def does(function):
        library.impl("toy", function, "CPU")
        return bound

    yield does
    library._destroy()


def test_a_compiled_kernel_is_the_op_of_its_name_with_its_flags(toy):
    bound = toy(lambda x, ordered: x + 1 if ordered else x)
    assert torch.ops.adatape_toy.toy.default._schema.arguments[1].name == "ordered"
    assert bound.function(torch.zeros(2)).tolist() == [1, 1]
    assert bound.devices == ("cpu",) and bound.dtypes == (torch.float32,)


def raising(error):
    def kernel(x, ordered):
        raise error

    return kernel


def test_what_a_compiled_kernel_refuses_names_the_op(toy):
    bound = toy(raising(RuntimeError("x: expected 2 rows, got 3\nException raised from here")))
    with pytest.raises(ValueError) as info:
        bound.function(torch.zeros(3))
    assert str(info.value) == "toy: x: expected 2 rows, got 3"


def test_another_error_of_a_compiled_kernel_stays_as_it_is(toy):
    bound = toy(raising(RuntimeError("no kernel image is available")))
    with pytest.raises(RuntimeError, match="^no kernel image is available"):
        bound.function(torch.zeros(3))


# The ops as torch sees them


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
