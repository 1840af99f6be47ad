"""Small models, images and a plan, of which one process and several have to make the same."""

import torch
from torch import nn

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    UViT,
    UViTConfig,
)
from adatape_kernels.recipes.training.train_plan import TrainPlan

CPU = torch.device("cpu")
SIZES = {"num_classes": 5, "dim": 16, "num_heads": 2, "ffn_dim": 16, "image_size": 8}
SIZES |= {"in_channels": 1, "patch_size": 4}
TAPE = {"depth": 2, "tape_ffn_dim": 8, "num_tape_tokens": 4, "topk": 2, "bank_patch_size": 2}
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 1.2}),
    "no tape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 0.0}),
    "uvit": (UViT, UViTConfig, {"depth": 4}),
    "avit": (AViT, AViTConfig, {"depth": 3, "gate_center": 4.0, "distribution_weight": 0.0}),
}
IMAGES = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(30) % 5
DATA = ImageSet(IMAGES[:17], LABELS[:17], IMAGES[17:], LABELS[17:], tuple("abcde"))
NORMALISE = Normaliser((0.5,), (0.3,))
PLAN = TrainPlan(2, 6, 0.1, max_grad_norm=0.5, mixup=0.4, loss="sigmoid")


def new_model(kind):
    made, config, options = MODELS[kind]
    torch.manual_seed(0)
    model = made(config(**SIZES, **options))
    nn.init.normal_(model.head.weight, std=0.1)  # a new head would send no gradient on
    return model.train()


def noisy(images, generator):
    return images + 0.1 * torch.rand(images.shape, generator=generator)
