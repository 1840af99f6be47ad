"""In how many forms Triton would compile the kernels of recorded launches, without a GPU."""

import functools

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature


@functools.cache
def _binder(kernel):
    """Return Triton's own function from arguments to what a compiled form depends on."""
    if isinstance(kernel, InterpretedFunction):
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def forms_of(launches):
    """Return the set of (kernel, its specialization, its options) that launches need."""
    found = set()
    for kernel, _, arguments in launches:
        _, specialization, options = _binder(kernel)(**arguments)
        found.add((kernel.__name__, str(specialization), str(sorted(options.items()))))
    return found
