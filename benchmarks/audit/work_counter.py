"""Counts what kernels do in triton's interpreter: bytes, products and launches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime import interpreter

SECTOR = 32
"""Bytes that memory delivers at least."""


@dataclass
class CountedWork:
    """Bytes that pass between chip and memory, FLOPs of products, all bytes accessed, launches."""

    bytes: float = 0
    flops: float = 0
    accessed: float = 0
    launches: float = 0

    def plus(self, other: "CountedWork", times: float = 1) -> "CountedWork":
        """Return this work and so many times the other, with as many launches as the latter."""
        return CountedWork(
            self.bytes + times * other.bytes,
            self.flops + times * other.flops,
            self.accessed + times * other.accessed,
            max(self.launches, other.launches),
        )


_CHECKS = ("lt", "gt", "ge", "le", "eq", "any", "__or__", "bitwise_or", "index", "nonzero", "item")


@dataclass
class _WorkCounter(TorchDispatchMode):
    """Counts what the interpreter does, launch by launch, and torch's own kernels around it."""

    work: CountedWork = field(default_factory=CountedWork)
    sectors: list[np.ndarray] = field(default_factory=list)
    interpreting: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        # The interpreter's own copies do not count, nor checks of values, which only a CPU has.
        if self.interpreting or function.is_view or "empty" in name or name in _CHECKS:
            return result
        # A kernel reads each tensor that it is given, save for a fill, and writes what it returns.
        fills = name.startswith("new_") or name.endswith("_like")
        given = () if fills else (args, kwargs)
        read = [x for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, Tensor)]
        written = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in (*read, *written))
        self.work.bytes += moved
        self.work.accessed += moved
        self.work.launches += 1
        if function.overloadpacket in flop_registry:
            self.work.flops += flop_registry[function.overloadpacket](
                *args, **kwargs, out_val=result
            )
        return result

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        # Masks of integers would choose elements by their number; a descriptor's is a memory view.
        exists = np.broadcast_to(np.asarray(mask).astype(bool), pointers.shape)
        places = pointers[exists].astype(np.int64)
        self.work.accessed += places.size * size
        self.sectors.append(np.unique(places // SECTOR))

    def end_launch(self) -> None:
        self.work.launches += 1
        if self.sectors:
            self.work.bytes += SECTOR * np.unique(np.concatenate(self.sectors)).size
        self.sectors.clear()


@contextmanager
def counting() -> Iterator[CountedWork]:
    """Count the work of every kernel that runs inside."""
    counter, builder = _WorkCounter(), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    add, dot = builder.create_atomic_rmw, builder.create_dot
    run = interpreter.GridExecutor.__call__

    def counted_load(pointers, mask, *rest, **options):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(pointers, mask, *rest, **options)

    def counted_store(pointers, value, mask, *rest, **options):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(pointers, value, mask, *rest, **options)

    def counted_add(operation, pointers, value, mask, *rest, **options):
        counter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return add(operation, pointers, value, mask, *rest, **options)

    def counted_dot(a, b, d, *rest, **options):
        counter.work.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, d, *rest, **options)

    def counted_run(self, *args, **options):
        counter.interpreting = True
        try:
            return run(self, *args, **options)
        finally:
            counter.interpreting = False
            counter.end_launch()

    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
    functions = (counted_load, counted_store, counted_add, counted_dot)
    try:
        for name, function in zip(names, functions, strict=True):
            setattr(builder, name, function)
        interpreter.GridExecutor.__call__ = counted_run
        with counter:
            yield counter.work
    finally:
        for name in names:
            delattr(builder, name)
        interpreter.GridExecutor.__call__ = run
