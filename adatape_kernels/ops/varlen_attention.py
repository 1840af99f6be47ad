"""Attention over packed sequences in the signatures that the field has for it.

The functions are `elastic_attention` on examples without tape rows: every row attends to all rows
of its own sequence. They serve what the layout of `ElasticBatch` serves, on a CPU and in float32
too; what they do not compute they refuse by name.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int, check_tensor, shown
from adatape_kernels.offsets import check_offsets_tensor
from adatape_kernels.ops.elastic_attention import (
    attention_with_lse,
    elastic_attention,
    no_tapes,
    qkvpacked,
    without_tapes,
)

_T = TypeVar("_T")

# By the name of an argument of `elastic_attention`, what it is called here.
_OURS = {"cu_inputs": "cu_seqlens", "max_rows": "max_seqlen"}
_TORCHS = {
    **{"q": "query", "k": "key", "v": "value"},
    **{"cu_inputs": "cu_seq_q", "max_rows": "max_q", "softmax_scale": "scale"},
}


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Let every row of a packed batch attend to the rows of its own sequence.

    Args:
        q, k, v: (rows, num_heads, head_dim); float32, float16, bfloat16 or float64; any strides.
        cu_seqlens: (batch + 1,) int32 or int64; sequence i owns rows cu_seqlens[i] to
            cu_seqlens[i + 1]; rows behind the last offset are unused.
        max_seqlen: a bound on the rows of one sequence, if known.
        softmax_scale: factor on the scores; None for 1 / sqrt(head_dim).

    Returns:
        (rows, num_heads, head_dim), dtype of q, contiguous; zero in unused rows.

    Raises:
        ValueError: as `elastic_attention`.

    Differentiable in q, k and v.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> v = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]], [[5.0, 5.0]]])
        >>> cu_seqlens = torch.tensor([0, 2, 3])
        >>> q = torch.zeros_like(v)
        >>> ak.ops.varlen_attention(q, q, v, cu_seqlens)[:, 0, 0].tolist()
        [2.0, 2.0, 5.0]

    Source: SPEC 6, with empty tapes.
    """
    found = without_tapes(q, k, v, cu_seqlens, None, max_seqlen, softmax_scale)
    if found is not None:
        return found[0]
    check_tensor("q", q)
    cu_tapes = _no_tapes("cu_seqlens", cu_seqlens, q)
    return _calling_arguments(
        _OURS,
        lambda: elastic_attention(
            q, k, v, cu_seqlens, cu_tapes, max_rows=max_seqlen, softmax_scale=softmax_scale
        ),
    )


def varlen_attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Do what `varlen_attention` does, where one projection made queries, keys and values.

    Args:
        qkv: (rows, 3, num_heads, head_dim), the queries, keys and values of each row; float32,
            float16, bfloat16 or float64; any strides.
        cu_seqlens, max_seqlen, softmax_scale: as in `varlen_attention`.

    Returns:
        (rows, num_heads, head_dim), dtype of qkv, contiguous; zero in unused rows.

    Raises:
        ValueError: as `elastic_attention_qkvpacked`.

    Differentiable in qkv, whose gradient is written as one tensor.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> qkv, cu_seqlens = torch.randn(6, 3, 4, 8), torch.tensor([0, 2, 6])
        >>> ak.ops.varlen_attention_qkvpacked(qkv, cu_seqlens, 4).shape
        torch.Size([6, 4, 8])

    Source: SPEC 6, with empty tapes; the arguments of flash_attn_varlen_qkvpacked_func.
    """
    found = qkvpacked.without_tapes(qkv, cu_seqlens, None, max_seqlen, softmax_scale)
    if found is not None:
        return found[0]
    check_tensor("qkv", qkv)
    cu_tapes = _no_tapes("cu_seqlens", cu_seqlens, qkv)
    return _calling_arguments(
        _OURS,
        lambda: qkvpacked.elastic_attention_qkvpacked(
            qkv, cu_seqlens, cu_tapes, max_rows=max_seqlen, softmax_scale=softmax_scale
        ),
    )


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Do what `torch.nn.attention.varlen.varlen_attn` does for self-attention, on any device.

    Args:
        query: (rows, num_heads, head_dim); float32, float16, bfloat16 or float64; any strides.
        key, value: (rows, num_heads, head_dim), or with enable_gqa fewer heads, a divisor of
            num_heads.
        cu_seq_q: (batch + 1,) int32 or int64, the bounds of each sequence.
        cu_seq_k: the same bounds.
        max_q, max_k: a bound on the rows of one sequence, twice.
        return_aux: torch's AuxRequest; with lse=True the log-sum-exp of the scores is returned
            too.
        scale: factor on the scores; None for 1 / sqrt(head_dim).
        window_size: (-1, -1); windows and causal attention are not computed.
        enable_gqa: whether key and value may have fewer heads, each for a group of query heads.
        seqused_k: None; caches of keys are not computed.
        block_table: None, likewise.
        num_splits: any; keys are never split, so that results do not depend on the batch.

    Returns:
        (rows, num_heads, head_dim), zero in rows behind the last offset; and, where it is asked
        for, the log-sum-exp (num_heads, rows), float32, which has no gradient.

    Raises:
        NotImplementedError: windows, causal attention, sequences of keys that differ from those of
            queries, seqused_k or block_table are asked for.
        ValueError: the numbers of heads do not go together, or as `elastic_attention`.

    Differentiable in query, key and value.

    Example:
        >>> import torch
        >>> from adatape_kernels.ops import varlen_attn  # torch.nn.attention.varlen
        >>> qkv = torch.randn(3, 6, 4, 8).unbind()
        >>> cu_seq = torch.tensor([0, 2, 6], dtype=torch.int32)
        >>> varlen_attn(*qkv, cu_seq, cu_seq, 4, 4).shape
        torch.Size([6, 4, 8])

    Source: the documentation of torch.nn.attention.varlen, torch 2.13 and 2.14.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("cu_seq_q", cu_seq_q)):
        check_tensor(name, tensor)
    if cu_seq_k is not None:
        check_tensor("cu_seq_k", cu_seq_k)
    max_q, max_k = check_int("max_q", max_q), check_int("max_k", max_k)
    window_size = tuple(window_size) if isinstance(window_size, list) else window_size
    if not isinstance(window_size, tuple) or window_size != (-1, -1):
        raise NotImplementedError(
            f"window_size: expected (-1, -1), as every row attends to its whole sequence, "
            f"got {shown(window_size)}"
        )
    for name, given in (("seqused_k", seqused_k), ("block_table", block_table)):
        if given is not None:
            raise NotImplementedError(f"{name}: expected None, as there is no cache of keys here")
    if max_q != max_k:
        raise NotImplementedError(
            f"max_k: expected {max_q} like max_q, as queries and keys are of the same sequences, "
            f"got {max_k}"
        )
    if cu_seq_k is not None and cu_seq_k is not cu_seq_q:
        _check_same_sequences(cu_seq_q, cu_seq_k)
    wants_lse = getattr(return_aux, "lse", None)
    if return_aux is not None and not isinstance(wants_lse, bool):
        raise TypeError(f"return_aux: expected None or an AuxRequest, got {shown(return_aux)}")
    key, value = (
        _for_every_head(name, given, query, enable_gqa)
        for name, given in (("key", key), ("value", value))
    )
    found = without_tapes(query, key, value, cu_seq_q, None, max_q, scale)
    if found is None:
        cu_tapes = _no_tapes("cu_seq_q", cu_seq_q, query)
        found = _calling_arguments(
            _TORCHS,
            lambda: attention_with_lse(
                query, key, value, cu_seq_q, cu_tapes, max_rows=max_q, softmax_scale=scale
            ),
        )
    out, lse = found
    return (out, lse.detach()) if wants_lse else out


def _no_tapes(name: str, cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """Return what `no_tapes` does of offsets that the arguments `name` and q have."""
    check_offsets_tensor(name, cu_seqlens, q)
    return no_tapes(cu_seqlens)


def _calling_arguments(names: Mapping[str, str], call: Callable[[], _T]) -> _T:
    """Return what a call returns; what it raises names the arguments as they are called here."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        words = rf"\b({'|'.join(names)})\b"
        message = re.sub(words, lambda found: names[found[0]], str(error))
        raise type(error)(message) from None


def _check_same_sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    """Refuse keys of other sequences than the queries', as far as the host can see.

    Where the bounds lie on a GPU, or torch traces, only their shapes are compared.
    """
    same = cu_seq_k.shape == cu_seq_q.shape
    visible = cu_seq_q.device.type == "cpu" == cu_seq_k.device.type
    if same and visible and not torch.compiler.is_compiling():
        same = torch.equal(cu_seq_q.long(), cu_seq_k.long())
    if not same:
        raise NotImplementedError(
            "cu_seq_k: expected the bounds of cu_seq_q, as queries and keys are of the same "
            "sequences, got others"
        )


def _for_every_head(name: str, given: Tensor, query: Tensor, enable_gqa: bool) -> Tensor:
    """Return keys or values with a head for each of the query's."""
    if given.dim() != 3 or query.dim() != 3 or given.shape[1] == query.shape[1]:
        return given  # the attention itself checks the rest
    heads, of_query = given.shape[1], query.shape[1]
    if not enable_gqa:
        raise ValueError(
            f"{name}: expected {of_query} heads like query, or enable_gqa=True, got {heads}"
        )
    if heads == 0 or of_query % heads:
        raise ValueError(
            f"{name}: expected a number of heads that divides {of_query} (the query's), got {heads}"
        )
    return given.repeat_interleave(of_query // heads, dim=1)
