import contextlib
import threading

import pytest
import torch
from checks import refused

import adatape_kernels
from adatape_kernels import backend, use_backend
from adatape_kernels.ops import (
    FFN,
    add_layer_norm,
    dual_ffn,
    elastic_attention,
    tape_gather,
    tape_select,
)
from adatape_kernels.ops.op import BACKENDS, Implementation, choose, current_backend, explain

OPS = ("tape_select", "tape_gather", "elastic_attention", "dual_ffn", "add_layer_norm")


def select(query, keys):
    return tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0)


def given():
    return torch.randn(3, 4), torch.randn(5, 4)


@pytest.fixture
def registered(monkeypatch):
    """Registers, for one test, a backend that runs the eager code and notes each of its calls.

    It takes the place of whatever this installation has under that name.
    """
    calls = []

    def register(name, *, ops=("tape_select", "tape_select_bwd"), **limits):
        for op in ops:
            eager = backend._implementations[op]["eager"]

            def run(*args, op=op, function=eager.function):
                calls.append((name, op))
                return function(*args)

            made = Implementation(run, **{"devices": None, "dtypes": eager.dtypes, **limits})
            monkeypatch.setitem(backend._implementations[op], name, made)
        backend._chosen.clear()
        return calls

    monkeypatch.setattr(backend, "_chosen", {})

    return register


@pytest.fixture
def eager_only(monkeypatch):
    monkeypatch.setattr(backend, "_chosen", {})
    for op, found in list(backend._implementations.items()):
        monkeypatch.setitem(backend._implementations, op, {"eager": found["eager"]})


def test_every_op_and_its_backward_has_the_eager_reference_everywhere():
    assert set(backend.registered_ops()) == {f"{op}{end}" for op in OPS for end in ("", "_bwd")}
    for op in backend.registered_ops():
        for device in ("cpu", "cuda", "xpu"):
            for dtype in backend.FLOAT_DTYPES:
                assert explain(op, device, dtype)["eager"] == "serves"


def test_a_registered_backend_serves_when_forced_and_only_then(eager_only, registered):
    calls = registered("triton")  # not among the CPU's own choices
    query, keys = given()
    expected = select(query, keys)
    assert calls == []
    with use_backend("triton"):
        actual = select(query, keys)
    assert calls == [("triton", "tape_select")]
    assert torch.equal(actual.weights, expected.weights)
    select(query, keys)
    assert len(calls) == 1


def test_the_default_is_the_first_in_the_device_s_order_that_serves(eager_only, registered):
    calls = registered("cpp", dtypes=(torch.float32,), devices=("cpu",))
    query, keys = given()
    assert backend.serving("tape_select", "cpu", torch.float32) == "cpp"
    assert backend.serving("tape_select", "cpu", torch.float64) == "eager"
    assert backend.serving("tape_select", "cuda", torch.float32) == "eager"
    assert backend.serving("tape_gather", "cpu", torch.float32) == "eager"
    select(query, keys)
    select(query.double(), keys.double())
    with use_backend("eager"):
        select(query, keys)
        with use_backend(None):
            select(query, keys)
    assert len(calls) == 2


def test_the_backward_takes_the_backend_around_its_call(eager_only, registered):
    calls = registered("triton")
    query, keys = given()
    weights = select(query.requires_grad_(), keys).weights
    with use_backend("triton"):
        weights.sum().backward()
    assert calls == [("triton", "tape_select_bwd")]


def test_the_backward_otherwise_takes_its_forward_s(eager_only, registered):
    """On a thread of its own, as autograd has them for a GPU."""
    calls = registered("triton")
    query, keys = given()
    with use_backend("triton"):
        weights = select(query.requires_grad_(), keys).weights
    calls.clear()
    thread = threading.Thread(target=lambda: weights.sum().backward())
    thread.start()
    thread.join()
    assert calls == [("triton", "tape_select_bwd")]


def test_a_compiled_graph_takes_the_backend_around_its_call(fresh_compiler, eager_only, registered):
    calls = registered("triton")
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    query, keys = given()
    expected = compiled(query, keys)
    assert calls == []
    with use_backend("triton"):
        actual = compiled(query, keys)
    assert calls == [("triton", "tape_select")]
    assert torch.equal(actual.weights, expected.weights)
    compiled(query, keys)
    assert len(calls) == 1


def test_all_ops_run_on_the_forced_backend(eager_only, registered):
    names = {f"{op}{suffix}" for op in OPS for suffix in ("", "_bwd")}
    calls = registered("cuda", ops=names)
    x = torch.randn(6, 4, requires_grad=True)
    offsets = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 6], dtype=torch.int32)
    ffn = FFN(torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4))
    with use_backend("cuda"):
        sel = select(x, x)
        tape, _ = tape_gather(x, sel.indices, sel.weights, sel.counts)
        heads = x.view(6, 2, 2)
        out = elastic_attention(heads, heads, heads, *offsets)
        _, normed = add_layer_norm(x, x, ffn.b2, ffn.b2)
        (tape.sum() + out.sum() + dual_ffn(x, 4, ffn).sum() + normed.sum()).backward()
    assert sorted(op for _, op in calls) == sorted(names)


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


@pytest.mark.parametrize("name", ["numpy", "Eager", "", 3])
def test_an_unknown_backend_is_refused(name):
    with refused("use_backend", "eager, cpp, triton, cuda", repr(name)), use_backend(name):
        raise AssertionError("entered an unknown backend")
    assert current_backend() is None


def refusal(run):
    with pytest.raises(RuntimeError) as info:
        run()
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "eager"])
def test_a_backend_that_is_not_installed_is_refused(eager_only, name):
    def enter():
        with use_backend(name):
            raise AssertionError("entered an absent backend")

    message = refusal(enter)
    assert repr(name) in message and "not available" in message
    assert current_backend() is None


def test_a_backend_without_the_op_device_or_dtype_says_so(eager_only, registered):
    registered("cpp", dtypes=(torch.float32,), devices=("cpu",))
    registered("cuda", devices=("cuda",))
    query, keys = given()
    with use_backend("cpp"):
        message = refusal(lambda: select(query.double(), keys.double()))
        assert message.startswith("tape_select: cpp cannot serve torch.float64 on cpu")
        assert "cpp: it takes float32" in message
        indices, counts = torch.zeros(1, 1, 1).int(), torch.ones(1).int()
        message = refusal(lambda: tape_gather(keys, indices, torch.ones(1, 1, 1), counts))
        assert message.startswith("tape_gather: cpp cannot serve")
        assert f"cpp: {backend._ABSENT['cpp']}" in message
    with use_backend("cuda"):
        message = refusal(lambda: select(query, keys))
        assert message.startswith("tape_select: cuda cannot serve torch.float32 on cpu")
        assert "cuda: it runs on cuda" in message
    assert choose("tape_select", query) is backend._implementations["tape_select"]["cpp"].function


def test_a_dtype_that_no_backend_serves_is_refused():
    query = torch.zeros(2, 4, dtype=torch.float8_e4m3fn)
    message = refusal(lambda: select(query, query))
    assert message.startswith("tape_select: every backend cannot serve torch.float8_e4m3fn on cpu")


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
