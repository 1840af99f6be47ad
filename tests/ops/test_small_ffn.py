"""`dual_ffn` on so few rows that csrc/cpu multiplies them itself, beside what torch multiplies."""

import pytest
import torch
from checks import assert_low_precision
from ffn_cases import by_reference, double, ffn

from adatape_kernels import ops
from adatape_kernels.ops import FFN

OP = "dual_ffn"
pytestmark = pytest.mark.backends("cpp", "eager")
# Products that every number of lanes leaves a rest of, and one of which rows lie apart.
SIZES = [(1, 1), (8, 8), (17, 33), (64, 31)]


def made(rows, dim, hidden, dtype):
    torch.manual_seed(0)
    two = (ffn(dim, hidden, gates, device="cpu", dtype=dtype) for gates in (1, 2))
    return torch.randn(rows, dim).to(dtype), *two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "hidden"), SIZES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_few_rows_are_as_exact_as_the_reference(dtype, dim, hidden, activation):
    x, *both = made(5, dim, hidden, dtype)
    wide_x, *wide = double(x, *both)
    exact = by_reference(wide_x, 3, *wide, activation=activation)
    plain = by_reference(x, 3, *both, activation=activation)
    found = ops.dual_ffn(x, 3, *both, activation=activation)
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
        assert_low_precision(found, plain, exact, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_what_few_of_them_are(dtype):
    """The many are torch's products, and the few ours."""
    x, *both = made(1200, 17, 33, dtype)
    many = ops.dual_ffn(x, 1000, *both)
    few = [ops.dual_ffn(x[i : i + 100], 100, *both) for i in range(0, 1000, 100)]
    few += [ops.dual_ffn(x[i : i + 100], 0, *both) for i in range(1000, 1200, 100)]
    error = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(many, torch.cat(few), rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_weights_may_lie_apart(dtype):
    x, input_ffn, tape_ffn = made(4, 17, 33, dtype)
    apart = torch.full((4, 40), torch.nan, dtype=dtype)
    apart[:, 3:20] = x
    turned = [FFN(w1.t().contiguous().t(), b1, w2, b2) for w1, b1, w2, b2 in (input_ffn, tape_ffn)]
    wider = torch.full((33, 20), torch.nan, dtype=dtype)
    wider[:, :17] = input_ffn.w1
    turned[0] = turned[0]._replace(w1=wider[:, :17])
    found = ops.dual_ffn(apart[:, 3:20], 2, *turned)
    assert torch.equal(found, ops.dual_ffn(x, 2, input_ffn, tape_ffn))


def test_poison_stays_in_its_row():
    x, *both = made(4, 17, 33, torch.float32)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    clean, found = ops.dual_ffn(x, 2, *both), ops.dual_ffn(poisoned, 2, *both)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_few_rows_run_without_a_call_of_torch():
    x, *both = made(4, 17, 33, torch.bfloat16)
    with torch.profiler.profile() as profile:
        torch.ops.adatape_cpu.dual_ffn(x, 2, 2, None, "gelu_tanh", *both[0], *both[1])
    called = {event.name for event in profile.events()}
    assert not {name for name in called if "mm" in name or "linear" in name}, called
