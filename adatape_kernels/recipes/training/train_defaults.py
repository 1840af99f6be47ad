"""What `train` does where no option says otherwise, by the names of TrainConfig's fields."""

from typing import Any

FIXED_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32}
"""The side in pixels, of the image sets whose images all have one size."""

DEFAULTS: dict[str, Any] = {
    "model_name": "adatape",
    "variant": None,
    "num_tape_tokens": 8,
    "topk": 4,
    "halt_threshold": 2.0,
    "halt_threshold_range": None,
    "batch": None,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "seed": 0,
    "limit": None,
    "drop_rest": False,
    "activation": "gelu_tanh",
    "bank": "input",
    "bank_size": 1000,
    "split_seed": None,
    "dtype": "float32",
    "source": None,
    "init": None,
    "act_epsilon": None,
    "act_level": None,
    "leave": None,
    "distinct_layers": None,
    "gate_scale": None,
    "gate_center": None,
    "ponder_weight": None,
    "distribution_weight": None,
    "recipe": None,
    "loss": "softmax",
    "label_smoothing": 0.05,
    "mixup": 0.0,
    "randaugment": 0,
    "randaugment_magnitude": 10,
    "random_erasing": 0.0,
    "ema": 0.0,
    "max_grad_norm": 1.0,
    "warmup_share": 0.05,
    "draws": "epoch",
    "unreadable": "stop",
    "unreadable_limit": 100,
}
"""Of every image set."""

OF_A_MODEL: dict[str, dict[str, Any]] = {"avit": {"gate_center": 4.0}}
"""Of a small model of a kind. An A-ViT's own gate is for DeiT's parameters: where a model begins
with new ones, whose features are small, it is so far closed that its gradient vanishes."""

FINE_TUNING: dict[str, Any] = {"epochs": 10, "lr": 5e-4}
"""What suits a model that begins with pretrained parameters."""

DEFAULT_BATCHES, DEFAULT_BATCH = {"digits": 48}, 128
"""The batch of some image sets and of all others, where they have images enough."""
LEAST_STEPS = 10
"""The number of steps in an epoch that a smaller batch is chosen for."""

DEFAULT_MODELS: dict[str, dict[str, int]] = {
    "digits": {"patch": 4, "bank_patch": 1, "dim": 64, "depth": 2, "heads": 4, "ffn": 128},
    "mnist": {"patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192},
    "fashion-mnist": {"patch": 7, "bank_patch": 4, "dim": 96, "depth": 4, "heads": 3, "ffn": 192},
    "cifar10": {"patch": 4, "bank_patch": 4, "dim": 128, "depth": 6, "heads": 4, "ffn": 256},
    "imagefolder": {"patch": 8, "bank_patch": 8, "dim": 128, "depth": 6, "heads": 4, "ffn": 256},
    "shards": {"patch": 8, "bank_patch": 8, "dim": 128, "depth": 6, "heads": 4, "ffn": 256},
}
"""The model's sizes, by image set."""

DEFAULT_TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 50, "lr": 3e-3},
    "mnist": {"epochs": 10},
    "fashion-mnist": {"epochs": 32},
    "cifar10": {"epochs": 30},
    "imagefolder": {"epochs": 30, "image_size": 64},
    "shards": {"epochs": 30, "image_size": 64},
}
"""What else a new model is trained with, by image set."""
