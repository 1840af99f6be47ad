"""What an implementation states, and how C++ becomes one: ops/implementation.py."""

import pytest
import torch

from adatape_kernels.ops.device_facts import EMULATED, facts_of
from adatape_kernels.ops.implementation import CompiledKernel, Implementation


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
    with pytest.raises(RuntimeError, match=r"^no kernel image is available"):
        bound.function(torch.zeros(3))
