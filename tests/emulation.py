"""What lets kernels for a GPU run on the CPU in tests; the tests own it.

Triton's kernels run in triton's interpreter, which `conftest.py` chooses before triton is imported.
The CUDA kernels run as C++ on the host, in a library that tests/cuda_host builds. Attention's
kernels for AMX run on a processor without it, in a library that tests/tiles builds.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

CUDA_HOST = Path(__file__).parents[1] / "build/cuda_host/adatape_cuda_host.so"


def cuda_host_library():
    """Return the library to load, or None where it was not built: `make test` builds it.

    A sanitizer's build has its own, which ADATAPE_CUDA_HOST names.
    """
    path = Path(os.environ.get("ADATAPE_CUDA_HOST", CUDA_HOST))
    return path if path.exists() else None


def load_cuda_host(path):
    """Let every implementation in CUDA C++ serve the CPU, where the library has its kernels.

    They have the shared memory of 9.0, or as many KiB for a block as ADATAPE_SHARED_KIB says.
    """
    torch.ops.load_library(path)
    if kib := os.environ.get("ADATAPE_SHARED_KIB"):
        set_shared_memory(int(kib))
    from adatape_kernels.ops.op import operation, registered_ops

    for name in registered_ops():
        found = operation(name).implementations.get("cuda")
        if found is not None:
            there = dataclasses.replace(found, devices=("cuda", "cpu"), absent=None)
            operation(name).replace("cuda", there)


def emulated_tiles_library():
    """Return the library to load, or None where it was not built: `make test` builds it."""
    tree = Path(__file__).parents[1] / f"build/cmake-{sys.implementation.cache_tag}"
    path = Path(os.environ.get("ADATAPE_EMULATED_TILES", tree / "adatape_emulated_tiles.so"))
    return path if path.exists() else None


def load_emulated_tiles(path):
    """Let the kernels for AMX serve attention in this process from here on, one tile at a time."""
    import adatape_kernels._C  # noqa: F401  # What it registers is replaced, so it comes first.

    torch.ops.load_library(path)


class TileCounts(NamedTuple):
    """What the process has done so far with the tiles that it emulates."""

    products: int
    releases: int
    """How often a thread was done with its tiles."""
    in_use: int
    """How many threads are not."""


def tile_counts(path):
    """Return what the library that `load_emulated_tiles` has loaded counts."""
    library = ctypes.CDLL(str(path))
    names = ("adatape_tile_products", "adatape_tile_releases", "adatape_tiles_in_use")
    functions = [getattr(library, name) for name in names]
    for function in functions:
        function.restype = ctypes.c_int64
    return TileCounts(*(function() for function in functions))


class NotedLaunch(NamedTuple):
    """A launch of a kernel of csrc/cuda, and a block's bytes of shared memory."""

    place: str
    """File and line."""
    dynamic: int
    static: int

    @property
    def bytes(self):
        """What both take; dynamic shared memory begins at a multiple of 128 bytes."""
        return self.dynamic + -(-self.static // 128) * 128


@contextlib.contextmanager
def noted_launches(*, run=False):
    """Collect the launches of csrc/cuda; without `run` they do not run."""
    library = ctypes.CDLL(str(cuda_host_library()))
    note = library.adatape_cuda_host_note_launches
    note.restype = ctypes.c_char_p
    launches = []
    note(2 if run else 1)
    try:
        yield launches
    finally:
        for line in note(0).decode().splitlines():
            place, dynamic, static = line.split()
            launches.append(NotedLaunch(place, int(dynamic), int(static)))


def set_shared_memory(kib):
    """Let a block have so much shared memory from here on; return how much it had before."""
    from adatape_kernels.ops import device_facts

    limit = ctypes.CDLL(str(cuda_host_library())).adatape_cuda_host_limit_shared
    limit.restype, limit.argtypes = ctypes.c_int64, [ctypes.c_int64]
    device_facts.EMULATED = device_facts.EMULATED._replace(shared_memory_per_block=kib << 10)
    device_facts.facts_of.cache_clear()
    return limit(kib << 10) >> 10


@contextlib.contextmanager
def shared_memory(kib):
    """Let the host play a GPU whose blocks may have so much shared memory; yields its facts."""
    from adatape_kernels.ops import device_facts

    before = set_shared_memory(kib)
    try:
        yield device_facts.EMULATED
    finally:
        set_shared_memory(before)


def compilation(launch):
    """Return what Triton compiles a launch's kernel for: another such value is another compilation.

    It goes by the dtypes of tensors, by the values of constants and options, and by whether an
    integer is longer than 32 bits. Unless the kernel says otherwise (`compiled_for`), it goes by
    whether a tensor is aligned, and whether an integer is 1 or a multiple of 16.
    """
    parameters = _parameters(launch.kernel)

    def kind(parameter, value):
        if isinstance(value, torch.Tensor):
            free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            return value.dtype, free or value.data_ptr() % 16 == 0
        if isinstance(value, tuple):
            return tuple(kind(parameter, part) for part in value)
        if hasattr(value, "block_shape"):  # a tensor that the GPU copies by blocks
            return value.base.dtype, tuple(value.block_shape)
        if type(value) is int:
            long = not -(2**31) <= value < 2**31
            return long if parameter.do_not_specialize else (value == 1, value % 16 == 0, long)
        return float if isinstance(value, float) else value

    kinds = []
    for name, value in sorted(launch.arguments.items()):
        parameter = parameters.get(name)
        constant = parameter is None or parameter.is_constexpr
        kinds.append((name, value if constant else kind(parameter, value)))
    return launch.kernel.__name__, tuple(kinds)


@functools.cache
def _parameters(kernel):
    """Return what Triton knows of a kernel's parameters, by name."""
    from triton.runtime.jit import JITFunction

    # The interpreter's kernels keep the function and the options of the decorator.
    made = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
    return {parameter.name: parameter for parameter in made.params}


def tensors_of(values):
    """Yield the tensors of a launch's arguments, and of tuples and descriptors among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_of(value)
        elif hasattr(value, "block_shape"):
            yield value.base


def sum_products_in_one_order():
    """Let the interpreter add up every element of a product alike, as a GPU does.

    It would take a BLAS, which rounds some elements otherwise than others.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(builder, a, b, d, *precision):
        product = np.einsum("...ij,...jk->...ik", a.data, b.data, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = dot


def keep_the_interpreter_ready():
    """Let Triton's interpreter prepare its language once, not at every call of a function.

    It looks through all members of `triton.language` at each launch, and again whenever a kernel
    calls another function, which takes a third of the time of a small kernel.
    """
    from triton.runtime import interpreter

    prepare, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    language, prepared, dtypes = interpreter.tl, {}, {}

    class Kept:
        def restore(self):
            """The language stays as it is: all kernels of this process are interpreted."""

    def prepare_once(fn):
        if id(fn.__globals__) not in prepared:
            prepared[id(fn.__globals__)] = fn.__globals__
            prepare(fn)
        return Kept()

    def dtype_of(kind):
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if isinstance(element, language.pointer_type):
            return find_dtype(element)
        if element.name not in dtypes:
            dtypes[element.name] = find_dtype(element)
        return dtypes[element.name]

    interpreter._patch_lang, interpreter._get_np_dtype = prepare_once, dtype_of
    _keep_the_facts_of_shapes(language.core)
    _leave_out_what_is_thrown_away()


def _keep_the_facts_of_shapes(core):
    """Let Triton's interpreter make the facts of a block's shape once, not for every block.

    Checking a shape, naming it and wrapping each of its numbers took a third of a kernel's time.
    What it makes of a shape never changes, so blocks may share it.
    """
    from triton.language.semantic import TritonSemantic

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    broadcast_any = TritonSemantic.broadcast_impl_value
    shapes, of_shapes, of_tensors = {}, {}, {}

    def block_type(self, element_ty, shape):
        try:
            key = element_ty.name, *shape
            known = of_shapes.get(key)
        except TypeError:  # a number that is wrapped, and has no hash
            make_type(self, element_ty, shape)
            return
        if known is None:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(self.shape), self.shape)
            known = of_shapes[key] = {n: x for n, x in vars(self).items() if n != "element_ty"}
        vars(self).update(known, element_ty=element_ty)

    def tensor(self, handle, type):
        shape = type.shape if type.is_block() else None
        known = of_tensors.get(id(shape))
        if known is None:
            make_tensor(self, handle, type)
            # The shape is kept beside its facts, so that no other one gets its number.
            of_tensors[id(shape)] = shape, self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = known

    def equal(self, other):
        return core.constexpr(self.values == list(getattr(other, "values", other)))

    def broadcast(semantic, a, b):
        if a.type.is_block() and b.type.is_block() and a.type.shape is b.type.shape:
            return a, b
        return broadcast_any(semantic, a, b)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value = broadcast
    core.tuple.__eq__ = equal


def _leave_out_what_is_thrown_away():
    """Let Triton's interpreter look for overflows of short integers only where it would tell.

    It computes every sum, difference and product of them a second time, in 64 bits, and without
    `debug` does nothing with what it finds, which took a third of a kernel's time.
    """
    from triton.language.semantic import TritonSemantic

    look = TritonSemantic.binary_op_sanitize_overflow_impl

    def look_if_told(semantic, *args):
        if semantic.builder.options.debug:
            look(semantic, *args)

    TritonSemantic.binary_op_sanitize_overflow_impl = look_if_told


def exponential_of_a_gpu(units):
    """Return an `InterpreterBuilder.create_exp` as wrong as an NVIDIA GPU's is allowed to be.

    Triton makes exp(x) of float32 of the instruction ex2.approx.f32, 2 to the power of a number,
    which is the rounded product x · log2(e). PTX allows the instruction 2 units in the last place.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_exp

    def exp(builder, x):
        if x.data.dtype != np.float32:
            return exact(builder, x)
        power = np.exp2((x.data * np.float32(1.4426950408889634)).astype(np.float64))
        return TensorHandle((power * (1 + units * 2.0**-23)).astype(np.float32), x.dtype.scalar)

    return exp
