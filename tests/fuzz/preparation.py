"""Makes a process ready to run cases of every backend."""

import os
import warnings


def prepare():
    """Let all backends serve the CPU, and fill with NaN what nobody has written yet."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    warnings.simplefilter("ignore")
    import emulation
    import torch

    from adatape_kernels.ops import triton_runtime

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if triton_runtime.INTERPRETED:
        emulation.sum_products_in_one_order()
        emulation.keep_the_interpreter_ready()
    if library := emulation.cuda_host_library():
        emulation.load_cuda_host(library)
