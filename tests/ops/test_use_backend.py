"""`use_backend`: backends and fallbacks by name, and refusals in words."""

import contextlib
import threading

import pytest
import torch
from checks import refused
from dispatch_cases import given, only, select

from adatape_kernels import use_backend
from adatape_kernels.ops import tape_gather
from adatape_kernels.ops.implementation import Implementation
from adatape_kernels.ops.op import (
    BACKENDS,
    NotServed,
    current_backend,
    operation,
    record,
    serving,
    why_absent,
)


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
    operation("tape_select").replace(name, Implementation(print, absent="it was left out"))
    assert why_absent(name) == "it was left out"
    arguments = ("eager", name) if as_fallback else (name,)
    with pytest.raises(RuntimeError) as info, use_backend(*arguments):
        raise AssertionError("entered an absent backend")
    expected = f"use_backend: backend {name!r} is not available: it was left out"
    assert str(info.value) == expected
    assert current_backend() is None


def test_a_backend_that_no_op_has_is_absent(eager_only):
    assert why_absent("triton") == "there is no such kernel" and why_absent("eager") is None


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
        assert "cpp: there is no such kernel" in message
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


def test_a_dtype_that_no_backend_serves_is_refused(monkeypatch):
    op = operation("tape_select")
    monkeypatch.setattr(op, "implementations", {"cpp": op.implementations["cpp"]})
    monkeypatch.setattr(op, "_candidates", {})
    query = torch.zeros(2, 4, dtype=torch.float64)
    message = refusal(lambda: select(query, query))
    assert message.startswith("tape_select: every backend cannot serve torch.float64 on cpu")
    assert "eager: there is no such kernel" in message


def refusal(run):
    with pytest.raises(NotServed) as info:
        run()
    assert isinstance(info.value, RuntimeError) and "\n" not in str(info.value)
    return str(info.value)
