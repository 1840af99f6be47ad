"""The implementations in CUDA C++ (csrc/cuda): which calls they take, and who takes the others.

Values are looked at where that costs no copy to the host: on the CPU, where tests run them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.backend import beside_cuda, cuda_devices, register_cuda
from adatape_kernels.ops.dual_ffn import middle_on_host
from adatape_kernels.ops.elastic_attention import check_examples
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
    function = _kernels.dual_ffn if serves else beside_cuda("dual_ffn", x)
    return function(x, max_input_rows, max_tape_rows, *rest)


@register_cuda("dual_ffn_bwd")
def _dual_ffn_bwd(
    dy: Tensor, x: Tensor, hidden: Tensor, tape_hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    serves = middle_on_host(x, len(hidden), len(tape_hidden))
    function = _kernels.dual_ffn_bwd if serves else beside_cuda("dual_ffn_bwd", x)
    return function(dy, x, hidden, tape_hidden, *rest)


@functools.cache
def _most_rows(device: torch.device) -> int:
    """Return the longest example that shared memory holds, in the forward and in the backward."""
    if device.type == "cpu":
        return 512
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return 512 if shared >= 164 * 1024 else 256


def _attention_serves(q: Tensor, max_rows: int | None) -> bool:
    """Return whether heads and examples are such; the batch decides nothing, nor its bits."""
    short = max_rows is not None and max_rows <= _most_rows(q.device)
    return short and q.shape[2] == 64 and q.dtype in (torch.float16, torch.bfloat16)


@register_cuda("elastic_attention")
def _elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    max_rows: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, ...]:
    args = q, k, v, cu_inputs, cu_tapes, max_rows, softmax_scale
    if not _attention_serves(q, max_rows):
        return beside_cuda("elastic_attention", q)(*args)
    if q.device.type == "cpu":
        check_examples(q, cu_inputs, cu_tapes, max_rows)
    return _kernels.elastic_attention(*args)


@register_cuda("elastic_attention_bwd")
def _elastic_attention_bwd(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    serves = _attention_serves(q, rest[-2])
    function = _kernels.elastic_attention_bwd if serves else beside_cuda("elastic_attention_bwd", q)
    return function(dout, q, *rest)


# Without a kernel in C++, so that a model runs under use_backend("cuda").
_devices = cuda_devices("dual_ffn")


@register_cuda("add_layer_norm", _devices)
def _add_layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return beside_cuda("add_layer_norm", x)(x, *rest)


@register_cuda("add_layer_norm_bwd", _devices)
def _add_layer_norm_bwd(dtotal: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return beside_cuda("add_layer_norm_bwd", dtotal)(dtotal, *rest)
