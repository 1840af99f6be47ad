"""The implementations in CUDA C++ (csrc/cuda): which calls they take, and who takes the others.

Values are looked at where that costs no copy to the host: on the CPU, where tests run them.
"""

from typing import Any

import torch
from torch import Tensor

from adatape_kernels.backend import beside_cuda, cuda_devices, register_cuda
from adatape_kernels.ops.dual_ffn import middle_on_host
from adatape_kernels.ops.tape_gather import check_values
from adatape_kernels.ops.tape_select import check_bank_lens

_kernels = torch.ops.adatape_cuda


@register_cuda("tape_select")
def _tape_select(query: Tensor, keys: Tensor, *options: Any) -> tuple[Tensor, ...]:
    if query.device.type == "cpu":
        check_bank_lens(options[-1], keys.shape[-2])
    return _kernels.tape_select(query, keys, *options)


@register_cuda("tape_select_bwd")
def _tape_select_bwd(*args: Any) -> tuple[Tensor, ...]:
    return _kernels.tape_select_bwd(*args, torch.are_deterministic_algorithms_enabled())


@register_cuda("tape_gather")
def _tape_gather(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, capacity: int | None
) -> tuple[Tensor, ...]:
    # Without a capacity the kernels look, as they copy a number to the host anyway.
    if capacity is not None and bank.device.type == "cpu":
        check_values(bank, indices, counts, capacity)
    return _kernels.tape_gather(bank, indices, weights, counts, capacity)


@register_cuda("tape_gather_bwd")
def _tape_gather_bwd(*args: Any) -> tuple[Tensor, ...]:
    return _kernels.tape_gather_bwd(*args, torch.are_deterministic_algorithms_enabled())


@register_cuda("dual_ffn")
def _dual_ffn(x: Tensor, max_input_rows: int, max_tape_rows: int, *rest: Any) -> tuple[Tensor, ...]:
    serves = middle_on_host(x, max_input_rows, max_tape_rows)
    function = _kernels.dual_ffn if serves else beside_cuda("dual_ffn")
    return function(x, max_input_rows, max_tape_rows, *rest)


@register_cuda("dual_ffn_bwd")
def _dual_ffn_bwd(
    dy: Tensor, x: Tensor, hidden: Tensor, tape_hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    serves = middle_on_host(x, len(hidden), len(tape_hidden))
    function = _kernels.dual_ffn_bwd if serves else beside_cuda("dual_ffn_bwd")
    return function(dy, x, hidden, tape_hidden, *rest)


# Without a kernel in C++, so that a model runs under use_backend("cuda"). The tests on the CPU have
# no need of it.
_gpu = tuple(device for device in cuda_devices("dual_ffn") if device == "cuda")


@register_cuda("add_layer_norm", _gpu)
def _add_layer_norm(*args: Any) -> tuple[Tensor, ...]:
    return beside_cuda("add_layer_norm")(*args)


@register_cuda("add_layer_norm_bwd", _gpu)
def _add_layer_norm_bwd(*args: Any) -> tuple[Tensor, ...]:
    return beside_cuda("add_layer_norm_bwd")(*args)
