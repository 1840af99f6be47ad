import pytest

from adatape_kernels.ops import FFN_PRODUCTS, ffn_products
from adatape_kernels.ops.implementation import Implementation
from adatape_kernels.ops.op import BACKENDS, operation, registered_ops


@pytest.fixture(params=FFN_PRODUCTS)
def products(request):
    """The form of the products of `dual_ffn` in Triton; the other backends have one form."""
    with ffn_products(request.param):
        yield request.param


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
