"""Small models of every kind that exports differ over, and their trained look."""

import torch

import adatape_kernels as ak
from adatape_kernels.data import Preprocessing

_SIZES = {"dim": 16, "num_heads": 2, "ffn_dim": 16, "num_tape_tokens": 3, "topk": 2}


def _vit(**options):
    """Images of 8 pixels and one channel; the bank is each image's own unless told otherwise."""
    return ak.models.adatape_vit("Ti/4", image_size=8, in_channels=1, **{**_SIZES, **options})


def _parity(**options):
    """Sequences of three symbols, whose bank has the same rows many times."""
    config = {"num_classes": 2, "depth": 1, "seq_len": 12, **_SIZES, **options}
    return ak.models.AdaTapeParity(ak.models.AdaTapeParityConfig(**config))


MODELS = {
    "input_token": lambda: _vit(depth=1, num_classes=4, tape_ffn_dim=8, halt_threshold=1.2),
    "learn_gap_two_reads": lambda: _vit(
        depth=2,
        num_classes=3,
        bank="learn",
        bank_size=20,
        pooling="mean",
        query="gap",
        read_layers=(0, 1),
        tape_mlp_dim=8,
        halt_threshold=1.0,
    ),
    "parity": lambda: _parity(halt_threshold=1.3),
}


def model_of(kind, dtype=torch.float32):
    """A model whose head answers, with names and, for images, a preprocessing."""
    model = MODELS[kind]().eval()
    torch.nn.init.normal_(model.head.weight)
    model.class_names = tuple(f"läuft {i}" for i in range(model.config.num_classes))
    if kind != "parity":
        model.preprocessing = Preprocessing(8, 1, (0.25,), (0.5,))
    return model.to(dtype)
