"""What error attention of float32 would have on tensor cores, beside torch's; emulated on the CPU.

    python -m adatape_kernels.benchmarks.audit.tf32_error

A tensor core multiplies TF32, which has float32's exponents and 11 of its 24 bits. Triton's
"tf32x3" splits each factor into two such parts and adds up three products, the least one left out.
What remains is the error of the sums: a tensor core adds few products at a time, 4 on 8.0, and
rounds each sum toward zero, so that the errors of a long sum do not cancel. A line tells by how
much the root mean square errors exceed those of torch's float32, all of them against float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
LOG2_E = 1.4426950408889634
TILE = 32
"""Keys or queries that are added to a program's sums at once."""


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x rounded to TF32, ties away from zero as `cvt.rna.tf32` does, and the rest cut to it.

    Finite numbers within 2⁻¹² of the largest are rounded to infinity, and their rest is infinite.
    """
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    big = torch.where(x.isnan(), x, rounded)
    return big, ((x - big).view(torch.int32) & -0x2000).view(torch.float32)


def three_products(a: Tensor, b: Tensor, group: int) -> Tensor:
    """Return a · b as Triton's "tf32x3" has tensor cores compute it, `group` products at a time."""
    (a_big, a_small), (b_big, b_small) = parts(a), parts(b)
    start = torch.zeros(a.shape[0], b.shape[1])
    small = _add(a_big, b_small, _add(a_small, b_big, start, group), group)
    return _add(a_big, b_big, torch.where(small.isnan(), 0.0, small), group)


def by_sixteens(a: Tensor, b: Tensor, group: int) -> Tensor:
    """Return a · b of three products for each 16 of the summed-up index, added up in float32."""
    pairs = zip(a.split(16, 1), b.split(16, 0), strict=True)
    return torch.stack([three_products(*pair, group) for pair in pairs]).cumsum(0)[-1]


def multiply_adds(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b by one fused multiply-add after the other, as float32's own units compute it."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for i in range(a.shape[1]):
        total = (total.double() + a[:, i : i + 1].double() * b[i : i + 1].double()).float()
    return total


def _add(a: Tensor, b: Tensor, total: Tensor, group: int) -> Tensor:
    """Add a · b to a total, of which a tensor core rounds every sum toward zero."""
    for some_a, some_b in zip(a.split(group, 1), b.split(group, 0), strict=True):
        exact = total.double() + (some_a.double()[:, :, None] * some_b.double()[None]).sum(1)
        total = exact.float()
        too_far = total.isfinite() & (total.double().abs() > exact.abs())
        total = torch.where(too_far, torch.nextafter(total, torch.zeros_like(total)), total)
    return total


def attend(q: Tensor, k: Tensor, v: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Return the result of our forward kernel, with its products by `product`, and lse."""
    scale = q.shape[1] ** -0.5 * LOG2_E
    out, total = torch.zeros_like(q), torch.zeros(len(q), 1)
    largest = torch.full((len(q), 1), -torch.inf)
    for k_n, v_n in zip(k.split(TILE), v.split(TILE), strict=True):
        scores = product(q, k_n.T) * scale
        largest_now = torch.maximum(largest, scores.amax(1, keepdim=True))
        p, decay = torch.exp2(scores - largest_now), torch.exp2(largest - largest_now)
        out, total = out * decay + product(p, v_n), total * decay + p.sum(1, keepdim=True)
        largest = largest_now
    return out / total, (largest + total.log2()) / LOG2_E


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, product: Product
) -> list[Tensor]:
    """Return dq, dk and dv of our backward kernel, with its products by `product`."""
    scale, delta = q.shape[1] ** -0.5, (dout * out).sum(1, keepdim=True)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for n in torch.arange(len(q)).split(TILE):
        p = torch.exp2(product(q[n], k.T) * (scale * LOG2_E) - lse[n] * LOG2_E)
        ds = p * (product(dout[n], v.T) - delta[n])
        dv, dk = dv + product(p.T, dout[n]), dk + product(ds.T, q[n])
        dq += product(
            torch.exp2(product(q, k[n].T) * (scale * LOG2_E) - lse * LOG2_E)
            * (product(dout, v[n].T) - delta),
            k[n],
        )
    return [dq * scale, dk * scale, dv]


def by_torch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return the result and the gradients in the dtype of the arguments."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], dout)]


def inputs(kind: str, rows: int, head_dim: int, seed: int) -> list[Tensor]:
    """Return dout, q, k and v of a kind."""
    generator = torch.Generator().manual_seed(seed)
    dout, q, k, v = torch.randn(4, rows, head_dim, generator=generator).unbind()
    if kind == "large scores":
        q = q * 10
    elif kind == "positive":
        dout, q, k, v = (x.abs() for x in (dout, q, k, v))
    return [dout, q, k, v]


FORMS: dict[str, tuple[Product, Product]] = {
    "multiply-adds": (multiply_adds, multiply_adds),
    **{
        f"{name}, {group} at a time": (partial(product, group=group), backward)
        for group in (4, 8)
        for name, product, backward in (
            ("tf32x3", three_products, partial(three_products, group=group)),
            ("tf32x3 forward only", three_products, multiply_adds),
            ("tf32x3 by sixteens", by_sixteens, partial(by_sixteens, group=group)),
        )
    },
}
"""The products of the forward kernel and of the backward kernel."""


def errors(form: str, kind: str, rows: int, head_dim: int, seeds: int) -> Iterator[float]:
    """Yield the root mean square error of out, dq, dk and dv as a multiple of torch's."""
    forward, backward = FORMS[form]
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(seeds):
        given = inputs(kind, rows, head_dim, seed)
        exact = by_torch(*(x.double() for x in given))
        out, lse = attend(*given[1:], forward)
        emulated = [out, *gradients(*given, out, lse, backward)]
        for i, found in enumerate((emulated, by_torch(*given))):
            squares[i] += torch.stack(
                [(f - e).square().mean() for f, e in zip(found, exact, strict=True)]
            )
    yield from (squares[0] / squares[1]).sqrt().tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=57)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(argv)
    print(f"{'':14}{'':38}{'out':>8}{'dq':>8}{'dk':>8}{'dv':>8}")
    for kind in ("normal", "large scores", "positive"):
        for form in FORMS:
            found = errors(form, kind, options.rows, options.head_dim, options.seeds)
            print(f"{kind:14}{form:38}" + "".join(f"{e:8.2f}" for e in found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
