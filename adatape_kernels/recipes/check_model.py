"""What `check` asks of a whole model: the padded one's results, and a step that a graph replays."""

import contextlib

import torch
from torch import Tensor

from adatape_kernels.models import AdaTapeViT, adatape_vit
from adatape_kernels.ops.op import use_backend


def _vit() -> AdaTapeViT:
    torch.manual_seed(6)
    return adatape_vit(
        "Ti/4",
        image_size=16,
        dim=64,
        depth=2,
        num_heads=2,
        ffn_dim=128,
        bank_patch_size=2,
        num_tape_tokens=5,
        topk=3,
        num_classes=10,
    )


def elastic_as_padded(backend: str, fallback: list[str]) -> str | None:
    """The same logits and gradients as the padded, masked, eager model."""
    model = _vit()
    images = torch.randn(6, 3, 16, 16)
    with use_backend(backend, fallback):
        ours = _logits_and_gradients(model, images)
    with use_backend("eager"):
        theirs = _logits_and_gradients(model.padded(), images)
    for a, b in zip(ours, theirs, strict=True):
        if not (a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item()):
            return f"it differs by {(a - b).abs().max().item():.1e}"
    return None


def _logits_and_gradients(model: torch.nn.Module, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(images).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def in_a_cuda_graph(backend: str, fallback: list[str]) -> str | None:
    """A step in capacity mode, captured once, replayed on other images."""
    model = _vit()
    images, others = torch.randn(2, 6, 3, 16, 16)
    static = images.clone()

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        logits = model(static, capacity=30).logits
        logits.square().sum().backward()
        return logits.detach()

    with use_backend(backend, fallback), contextlib.ExitStack() as stack:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        stack.enter_context(torch.cuda.stream(stream))
        for _ in range(2):
            step()
        stack.close()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        static.copy_(others)
        graph.replay()
        replayed = [
            logits.clone(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
        expected = _logits_and_gradients(model, others)
    for a, b in zip(replayed, expected, strict=True):
        if not (a - b).abs().max() <= 1e-4 * max(1.0, b.abs().max().item()):
            return f"the replayed step differs by {(a - b).abs().max().item():.1e}"
    return None
