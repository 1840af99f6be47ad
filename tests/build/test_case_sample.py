"""`--cases-of-a-kind`: what is left of the cases, and what the counter says of those on a GPU."""

import itertools
from types import SimpleNamespace

import case_sample
import pytest
import torch

KINDS = [
    (name, device, backend, dtype)
    for name in ("test_a", "test_b")
    for device in ("cpu", "cuda")
    for backend in ("eager", "triton")
    for dtype in (torch.float32, torch.bfloat16)
]


def item(name, device, backend, dtype, shape):
    params = {"device": (device, backend), "dtype": dtype, "shape": shape}
    return SimpleNamespace(
        path="test_x.py", originalname=name, callspec=SimpleNamespace(params=params)
    )


@pytest.mark.parametrize("number", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_every_kind_keeps_cases_that_lie_evenly(number, most):
    items = [item(*kind, shape) for shape in range(number) for kind in KINDS]
    kept = case_sample.sample(items, most)
    assert [x for x in items if any(x is k for k in kept)] == kept
    shapes = {}
    for x in kept:
        shapes.setdefault(case_sample.kind_of(x), []).append(x.callspec.params["shape"])
    assert len(shapes) == len(KINDS)
    (chosen,) = set(map(tuple, shapes.values()))
    assert len(chosen) == min(number, most) and chosen[0] == 0
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert most == 1 or chosen[-1] == number - 1


def test_a_case_without_parameters_is_a_kind():
    items = [SimpleNamespace(path=path, originalname="test_a") for path in ("x.py", "y.py")]
    assert case_sample.sample(items, 1) == items
