"""The two ways in which a bank gets its gradient, for the tests that compare them."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels.layers import TapeReader, recomputed_bank


@pytest.fixture
def of_any_size(monkeypatch):
    """Let small banks do what otherwise pays for large ones only."""
    for name in ("LEAST_ELEMENTS", "LEAST_FROM_PATCHES_ON_CPU"):
        monkeypatch.setattr(recomputed_bank, name, 1)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def makes_rows_again(function, *args, **options):
    """Whether a call makes what was read once more, with a gradient."""
    with _Names() as names:
        function(*args, **options)
    assert "tape_read" in names.seen or "tape_select" in names.seen
    return "tape_read_again" in names.seen


@contextlib.contextmanager
def all_entries(module):
    """Let the gradient pass all entries of banks: a hook on a norm is to see each of them."""
    readers = [each for each in module.modules() if isinstance(each, TapeReader)]
    handles = [r.bank_norm.register_forward_hook(lambda *args: None) for r in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def largest_saved():
    """Collect the number of elements of each tensor that is saved for a backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
