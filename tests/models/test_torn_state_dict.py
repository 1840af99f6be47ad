"""A state dict that lost a tensor which the other blocks of its ViT have."""

import pytest
from checks import refused
from torch import ones, zeros

from adatape_kernels.models import from_timm

DIM, DEPTH = 8, 3


def state():
    """Return the tensors of a small ViT with biases and LayerScale, by timm's names."""
    shapes = {"patch_embed.proj": (DIM, 1, 4, 4), "norm": (DIM,), "head": (2, DIM)}
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.norm{n}": (DIM,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.attn.qkv": (3 * DIM, DIM), f"blocks.{i}.attn.proj": (DIM, DIM)}
        shapes |= {f"blocks.{i}.mlp.fc1": (16, DIM), f"blocks.{i}.mlp.fc2": (DIM, 16)}
    tensors = {f"{name}.weight": ones(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": ones(shape[0]) for name, shape in shapes.items()}
    tensors |= {f"blocks.{i}.ls{n}.gamma": ones(DIM) for i in range(DEPTH) for n in (1, 2)}
    return tensors | {"cls_token": zeros(1, 1, DIM), "pos_embed": zeros(1, 5, DIM)}


LOST = ("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "ls1.gamma", "ls2.gamma")


@pytest.mark.parametrize("name", LOST)
def test_what_one_block_lacks_is_named(name):
    tensors = state()
    shape = tuple(tensors.pop(f"blocks.1.{name}").shape)
    with refused("model", f"blocks.1.{name} {shape} / none"):
        from_timm(tensors, num_heads=2, bank_patch_size=2)


@pytest.mark.parametrize("name", LOST)
def test_what_all_blocks_lack_is_not_needed(name):
    tensors = {key: value for key, value in state().items() if not key.endswith(name)}
    from_timm(tensors, num_heads=2, bank_patch_size=2)
