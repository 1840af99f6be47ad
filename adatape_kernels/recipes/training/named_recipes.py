"""Named configurations of `train`: whole sets of options, which those that are given go before."""

from dataclasses import replace
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.models import AdaTapeViTConfig, ViTConfig

_SMALL: dict[str, Any] = {
    "patch": 4,
    "bank_patch": 4,
    "dim": 96,
    "depth": 6,
    "heads": 3,
    "ffn": 192,
    "num_tape_tokens": 8,
    "topk": 4,
    "loss": "softmax",
    "label_smoothing": 0.1,
    "weight_decay": 0.05,
    "warmup_share": 0.1,
    "max_grad_norm": 1.0,
    "ema": 0.999,
    "batch": 64,
}

_IMAGENET: dict[str, Any] = {
    "variant": "S/16",
    "image_size": 224,
    "bank": "input",
    "bank_patch": 8,
    "num_tape_tokens": 10,
    "topk": 5,
    "halt_threshold": 2.0,
    "activation": "gelu_tanh",
    "loss": "sigmoid",
    "label_smoothing": 0.0,
    "mixup": 0.5,
    "randaugment": 2,
    "randaugment_magnitude": 29,
    "random_erasing": 0.0,
    "ema": 0.0,
    "epochs": 300,
    "batch": 4096,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "warmup_share": 10_000 / (300 * (1_281_167 // 4096)),
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "fashion-mnist": {**_SMALL, "epochs": 50, "lr": 2e-3},
        "cifar10": {**_SMALL, "epochs": 20, "lr": 1.5e-3},
    },
    "imagenet": {"imagefolder": _IMAGENET, "shards": _IMAGENET},
}
"""The options of each recipe, by the image sets that it is for.

"small" trains an AdaTape of less than a million parameters on two cores in about an hour.

"imagenet" is scenic's configuration of AdaTape on ImageNet, whose images are in folders or shards.
Its source is google-research/scenic,
projects/adatape/adatape_vit/configs/imagenet_adatape_vit_config.py; the names in brackets are those
of its entries, the others those of the files that they are read in.

| options | scenic |
|---|---|
| variant S/16 | [VARIANT]; width 384, depth 12, 6 heads, feed-forward 1,536 |
| image_size 224 | [pp_train], decode_jpeg_and_inception_crop(224) |
| bank input, bank_patch 8 | [bank_type], [patch_bank_size] |
| num_tape_tokens 10 | [num_tape_tokens] |
| halt_threshold 2 | [act_epsilon] |
| topk 5 | layers.py, ACTFunction: num_tape_tokens // threshold |
| activation gelu_tanh | flax's gelu, which approximates by tanh |
| loss sigmoid | adatape_vit.py, AdaTapeMultiLabelClassificationModel; [init_head_bias] -6.9 |
| label_smoothing 0 | [label_smoothing] None |
| mixup 0.5 | [mixup.alpha]; one share for a batch there, one for each image here |
| randaugment 2 | [pp_train], randaug(2, 15) |
| randaugment_magnitude 29 | the same: its 15 on a scale of 10 is 45 of kornia's, whose most is 29 |
| random_erasing 0, ema 0 | nothing of the kind is there |
| epochs 300, batch 4096, lr 0.001 | [num_training_epochs], [batch_size], [base_learning_rate] |
| weight_decay 0.1 | [optimizer_configs.weight_decay]; train_lib/optimizers.py makes adam adamw |
| max_grad_norm 1 | [max_grad_norm] |
| warmup_share | [warmup_steps] 10,000 of 300 epochs of 1,281,167 // 4,096 steps |

Scenic's file has one variant, and the sizes of Ti, S, B and L by name; no other entry depends on
them, so that B/32 is this recipe with `--variant B/32`, bank patches of 8 pixels included.

The schedule is [factors], a linear warm-up and then a cosine, which begins where the warm-up ends.
There is no dropout, and no stochastic depth: [dropout_rate] and [attention_dropout_rate] are 0, and
stochastic_depth is not among the entries. What differs: an image is cut to the square in its middle
and moved by up to an eighth of its side, where scenic cuts a part of random size and shape out of
it.
"""

MODEL_FIELDS: dict[str | None, dict[str, Any]] = {
    "small": {"tape_ffn_dim": 0},
    "imagenet": {
        "read_layers": (1,),
        "tape_ffn_dim": 0,
        "loss_type": "entropy",
        "average_query": True,
    },
}
"""Fields of an AdaTape's configuration that a recipe decides and that are no options.

Tape tokens of "small" share the feed-forward of the input tokens, as those of "imagenet" do. Those
of "imagenet" are [add_tape_token_to_layers], [enc_tt_mlp_dim], [act_loss_type] and [complex_query].
"""

SIZE_FIELDS: dict[str | None, dict[str, str]] = {
    "imagenet": {"key_split": "num_heads", "tape_mlp_dim": "ffn_dim"}
}
"""Fields of an AdaTape's configuration that a recipe makes equal to a size of the ViT.

Those of "imagenet" are [split_tt] and [tt_mlp_dim], by [NUM_HEADS] and [MLP_DIM] of any variant.
"""

PLAN_FIELDS: dict[str | None, dict[str, Any]] = {"imagenet": {"decay_after_warmup": True}}
"""Fields of a TrainPlan that a recipe decides and that are no options.

That of "imagenet" is scenic's cosine_decay in train_lib/lr_schedules.py.
"""


def recipe_values(recipe: str, data: str) -> dict[str, Any]:
    """Return the options of a recipe for an image set.

    Args:
        recipe: a name in RECIPES.
        data: name of the image set.

    Raises:
        ValueError: there is no such recipe for this set.
    """
    fitting = [name for name, sets in RECIPES.items() if data in sets]
    if recipe not in fitting:
        expected = " or ".join(fitting) or "none"
        raise ValueError(f"recipe: expected {expected} for {data}, got {shown(recipe)}")
    return RECIPES[recipe][data]


def with_recipe(config: ViTConfig, recipe: str | None) -> ViTConfig:
    """Return a model's configuration with the fields that a recipe decides.

    Args:
        config: that of a model of any kind; one that reads no tape stays as it is.
        recipe: a name in RECIPES, or None.

    Raises:
        ValueError: they do not fit the model's sizes.
    """
    if not isinstance(config, AdaTapeViTConfig) or not config.read_layers:
        return config
    sizes = SIZE_FIELDS.get(recipe, {})
    equal = {field: getattr(config, size) for field, size in sizes.items()}
    return replace(config, **{**MODEL_FIELDS.get(recipe, {}), **equal})
