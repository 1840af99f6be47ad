"""The examples of an elastic batch one by one: taken out of its buffer, and put into one."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.arguments import check_tensor, shown
from adatape_kernels.offsets import check_same_device


class ElasticExample(NamedTuple):
    """One example of an `ElasticBatch`, which gives it by iteration and by `batch[i]`.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> rows = torch.arange(6.0).view(1, 3, 2)
        >>> batch = ak.ElasticBatch.from_padded(rows, tape_lens=torch.tensor([1]))
        >>> inputs, tape = batch[0]
        >>> inputs.tolist(), tape.tolist()
        ([[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]])
    """

    inputs: Tensor
    """(input rows, dim), a view of the batch's data, through which gradients pass."""
    tape: Tensor
    """(tape rows, dim), likewise."""


def examples_of(data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor) -> Iterator[ElasticExample]:
    """Yield each example of a layout. Copies the offsets to the host, once."""
    inputs, tapes = torch.stack([cu_inputs, cu_tapes]).tolist()
    for i in range(len(inputs) - 1):
        yield ElasticExample(data[inputs[i] : inputs[i + 1]], data[tapes[i] : tapes[i + 1]])


def example_at(number: int, data: Tensor, cu_inputs: Tensor, cu_tapes: Tensor) -> ElasticExample:
    """Return one example of a layout. Copies its four offsets to the host."""
    bounds = torch.stack([cu_inputs[number : number + 2], cu_tapes[number : number + 2]])
    (input_start, input_end), (tape_start, tape_end) = bounds.tolist()
    return ElasticExample(data[input_start:input_end], data[tape_start:tape_end])


def checked_examples(examples: Iterable[Any]) -> list[ElasticExample]:
    """Return the examples that `ElasticBatch.from_examples` is given; raises as it says."""
    if isinstance(examples, Tensor) or not isinstance(examples, Iterable):
        raise TypeError(f"examples: expected several, got {shown(examples)}")
    found: list[ElasticExample] = []
    for i, example in enumerate(examples):
        name, pair = f"examples[{i}]", (example, None) if isinstance(example, Tensor) else example
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"{name}: expected rows, or a pair of input rows and tape rows, "
                f"got {shown(example)}"
            )
        inputs, tape = pair
        check_tensor(name, inputs)
        if tape is not None:
            check_tensor(name, tape)
        like = found[0].inputs if found else inputs
        for rows in (inputs, inputs if tape is None else tape):
            if rows.is_nested or rows.layout != torch.strided:
                raise ValueError(
                    f"{name}: expected a dense tensor, got one of layout {rows.layout}"
                )
            if rows.dim() != 2 or rows.shape[1] != like.shape[-1] or rows.dtype != like.dtype:
                width = like.shape[-1] if like.dim() == 2 else "dim"
                raise ValueError(
                    f"{name}: expected {like.dtype} (rows, {width}) like the first, "
                    f"got {shown(rows)}"
                )
            check_same_device(name, rows, like)
        found.append(ElasticExample(inputs, inputs[:0] if tape is None else tape))
    if not found:
        raise ValueError("examples: expected at least one, got none")
    return found
