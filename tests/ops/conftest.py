import pytest

from adatape_kernels.ops import FFN_PRODUCTS, ffn_products


@pytest.fixture(params=FFN_PRODUCTS)
def products(request):
    """The form of the products of `dual_ffn` in Triton; the other backends have one form."""
    with ffn_products(request.param):
        yield request.param
