"""`dual_ffn` on the rows in use of a larger buffer, with products on rounded numbers of rows."""

import pytest
import torch

from adatape_kernels import ops

OP = "dual_ffn"
SHAPES = ((48, 32), (48,), (32, 48), (32,)), ((40, 32), (40,), (32, 20), (32,))


@pytest.mark.backends("cpp", "eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 65, 97, 129, 513, 1000, 2047])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_rows_in_use_are_as_without_unused_ones(device, dtype, rows, share):
    torch.manual_seed(rows)
    tapes, unused = int(share * rows), 3
    x, dy = torch.randn(rows, 32).to(dtype), torch.randn(rows, 32).to(dtype)
    parameters = [torch.randn(shape).to(dtype) for both in SHAPES for shape in both]

    def run(x, num_rows):
        leaves = [each.clone().requires_grad_() for each in (x, *parameters)]
        ffns = ops.FFN(*leaves[1:5]), ops.FFN(*leaves[5:])
        y = ops.dual_ffn(leaves[0], rows - tapes, *ffns, num_rows=num_rows)
        y[:rows].backward(dy)
        return y.detach(), *(leaf.grad for leaf in leaves)

    exact = run(x, None)
    larger = run(torch.cat([x, torch.full((unused, 32), torch.nan).to(dtype)]), torch.tensor(rows))
    for found in larger[:2]:
        assert not found[rows:].any()
    for found, wanted in zip(larger, exact, strict=True):
        given = found[: len(wanted)]
        # Sums over rows may be added up in another order.
        torch.testing.assert_close(
            given, wanted, rtol=2e-2, atol=1e-2 * float(wanted.abs().sum() > 0)
        )
