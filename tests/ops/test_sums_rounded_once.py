"""What other ops sum in half precision is rounded once, also where large addends cancel."""

import pytest
import torch

from adatape_kernels.ops import add_layer_norm, tape_gather

OP = "tape_gather", "add_layer_norm"
pytestmark = pytest.mark.parametrize("dtype", [torch.bfloat16])


def assert_rounded_once(actual, exact, size):
    """The error is that of one rounding of the result, and of float32 sums of this size."""
    error = (actual.double() - exact).abs()
    allowed = torch.finfo(actual.dtype).eps / 2 * exact.abs() + 1e-6 * size
    assert (error <= allowed).all(), (error - allowed).max()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_tape_tokens(device, dtype, shared):
    bank = 100 * torch.randn(*([] if shared else [2]), 8, 24, device=device)
    bank = bank.to(dtype)
    bank[..., 4:, :] = -bank[..., :4, :]
    indices = torch.tensor([[[0, 4, 1], [2, 6, 3]]] * 2, dtype=torch.int32, device=device)
    weights = torch.tensor([0.3, 0.299, 0.01], device=device).expand(2, 2, 3).contiguous()
    counts = torch.full((2,), 2, dtype=torch.int32, device=device)
    tape, _ = tape_gather(bank, indices, weights, counts)
    rows = bank if shared else bank[0]
    tapes = [tape] if shared else [tape[:2]]
    for actual in tapes:
        exact = (rows.double()[indices[0].long()] * weights[0].double().unsqueeze(-1)).sum(1)
        assert_rounded_once(actual[:2], exact, size=100)


def test_gradient_of_a_bank(device, dtype):
    bank = torch.zeros(3, 24, dtype=dtype, device=device, requires_grad=True)
    indices = torch.zeros(2, 1, 1, dtype=torch.int32, device=device)
    weights = torch.tensor([0.3, -0.299], device=device).view(2, 1, 1)
    counts = torch.ones(2, dtype=torch.int32, device=device)
    tape, _ = tape_gather(bank, indices, weights, counts)
    dtape = 100 * torch.randn(1, 24, device=device).to(dtype).expand(2, 24)
    (dbank,) = torch.autograd.grad(tape, bank, dtape)
    exact = (dtape.double() * weights.view(2, 1).double()).sum(0)
    assert_rounded_once(dbank[0], exact, size=100)


def test_normalised_rows(device, dtype):
    """The bias is the negative of what it is added to."""
    x = torch.randn(1, 32, device=device).to(dtype)
    weight = (50 + torch.rand(32, device=device)).to(dtype)
    centred = x.double() - x.double().mean()
    y = centred / (centred.square().mean() + 1e-6).sqrt() * weight.double()
    bias = -y[0].to(dtype)
    total, normed = add_layer_norm(x, torch.zeros_like(x), weight, bias, eps=1e-6)
    assert torch.equal(total, x)
    assert_rounded_once(normed, y + bias.double(), size=100)
