"""The choice of `use_backend`: what it refuses, and where it reaches."""

import asyncio

import pytest
import torch
from checks import refused

from adatape_kernels import ops, use_backend
from adatape_kernels.ops.op import current_backend, record, why_absent

pytestmark = pytest.mark.skipif(
    why_absent("cpp") is not None, reason=f"the compiled part is not there: {why_absent('cpp')}"
)


def select(query, keys=None):
    keys = torch.ones(5, 4) if keys is None else keys
    return ops.tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=1.0)


@pytest.mark.parametrize(
    "fallback",
    ["cpp", ["eager", "eager"], ["eager", "cpp"], {"eager"}, {"eager": 1}, 0, 3, iter(["eager"])],
    ids=["itself", "twice", "itself-too", "set", "dict", "zero", "three", "iterator"],
)
def test_a_fallback_is_a_list_of_other_names(fallback):
    with refused("fallback", repr(fallback)):
        use_backend("cpp", fallback=fallback)


@pytest.mark.parametrize("fallback", [[None], "cpp,eager", [""], "numpy"])
def test_a_fallback_names_backends(fallback):
    with refused("use_backend", "eager, cpp, triton, cuda"):
        use_backend("cpp", fallback=fallback)


def test_tasks_of_one_thread_choose_for_themselves():
    seen = []

    async def task(name, mine, other):
        with use_backend(name), record() as ran:
            mine.set()
            await other.wait()
            select(torch.ones(1, 4))
            seen.append((name, current_backend(), {entry.backend for entry in ran}))

    async def both():
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("eager", one, two), task("cpp", two, one))

    asyncio.run(both())
    assert {(name, current) for name, current, _ in seen} == {("eager",) * 2, ("cpp",) * 2}
    assert current_backend() is None


def backwards(run):
    with record() as ran:
        run()
    return [entry.backend for entry in ran if entry.op == "tape_select_bwd"]


def test_asking_for_the_default_around_a_backward_is_asking():
    with use_backend("eager"):
        read = select(torch.ones(1, 4, requires_grad=True)).weights.sum()
    assert backwards(lambda: read.backward(retain_graph=True)) == ["eager"]
    with use_backend(None):
        assert backwards(lambda: read.backward(retain_graph=True)) == ["cpp"]
    assert backwards(read.backward) == ["eager"]


def test_a_call_that_raised_did_not_run():
    bank_lens = torch.tensor([9])
    with record() as ran, refused("bank_lens"):
        ops.tape_select(
            torch.ones(1, 4),
            torch.ones(5, 4),
            num_tape_tokens=2,
            topk=2,
            halt_threshold=1.0,
            bank_lens=bank_lens,
        )
    assert ran == []
