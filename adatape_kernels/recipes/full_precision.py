"""Products of torch in float32's own accuracy; TensorFloat-32 keeps 10 of a number's 23 bits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Switch TensorFloat-32 off in cuBLAS and cuDNN, which has it on by default."""
    cublas: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    older = [(x, "allow_tf32", False) for x in (cublas, cudnn)]
    newer = [(x, "fp32_precision", "ieee") for x in (cublas, cudnn.conv, cudnn.rnn)]
    settings: list[tuple[Any, str, Any]] = [*older]
    try:
        before = [getattr(place, name) for place, name, _ in settings]
    except RuntimeError:  # a program that has used the newer names cannot read the older ones
        settings = [*newer]
        before = [getattr(place, name) for place, name, _ in settings]
    for place, name, value in settings:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)
