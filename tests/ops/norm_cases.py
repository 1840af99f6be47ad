"""Calls of `add_layer_norm` for its tests."""

import torch

from adatape_kernels.ops.op import meta, operation


def not_served(device, backend, dim=12, dtype=torch.float32, **parameters):
    """For `absent_if`: why a backend does not serve the calls that a test's parameters make."""
    if backend is None:
        return None
    x, weight = meta(7, dim, dtype=dtype), meta(dim, dtype=dtype)
    return operation("add_layer_norm").refusal(backend, (x, x, weight, weight, 1e-6), device)


def stream(device, rows=7, dim=12, dtype=torch.float32):
    """x, branch, weight and bias; rows away from zero, as a residual stream's are."""
    x = torch.randn(rows, dim, device=device) + torch.randn(rows, 1, device=device)
    branch, weight, bias = (torch.randn(*s, dim, device=device) for s in ([rows], [], []))
    return [t.to(dtype) for t in (x, branch, weight, bias)]
