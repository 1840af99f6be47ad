"""The recipe of ImageNet for each size of a ViT, beside what scenic's file makes of its name."""

import pytest

from adatape_kernels.models.scenic_config import model_config
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import TrainPlan

pytestmark = pytest.mark.no_backend

# HIDDEN_SIZE, NUM_HEADS, MLP_DIM and NUM_LAYERS of scenic's imagenet_adatape_vit_config.py.
SIZES = {
    "Ti": (192, 3, 768, 12),
    "S": (384, 6, 1536, 12),
    "B": (768, 12, 3072, 12),
    "L": (1024, 16, 4096, 24),
}


def scenic(size, patch, **others):
    dim, heads, mlp, layers = SIZES[size]
    return model_config(
        {
            "kind": "adatape_vit",
            "num_classes": 1000,
            "hidden_size": dim,
            "num_layers": layers,
            "num_heads": heads,
            "mlp_dim": mlp,
            "classifier": "gap",
            "image": 224,
            "patch": patch,
            "add_tape_token_to_layers": [1],
            "num_tape_tokens": 10,
            "tape_bank_size": 1000,
            "tt_mlp_dim": mlp,
            "enc_tt_mlp_dim": 0,
            "split_tt": heads,
            "bank_type": "input",
            "bank_norm": True,
            "patch_bank_size": 8,
            "query_type": "gap",
            "dynamic_tape_length": {
                "num_token_per_step": 1,
                "act_epsilon": 2.0,
                "act_loss_weight": 0.01,
                "act_loss_type": "entropy",
                "bernoulli_p": 0.0,
                "complex_query": True,
                "query_noise": 0.0,
            },
            **others,
        }
    )


@pytest.mark.parametrize("variant", ["Ti/16", "S/16", "S/32", "B/16", "B/32", "L/16"])
@pytest.mark.parametrize("data", ["imagefolder", "shards"])
def test_a_variant_has_scenic_s_sizes(variant, data):
    size, patch = variant.split("/")
    config = TrainConfig.of({"data": data, "recipe": "imagenet", "variant": variant})
    assert config.vit_config(1000, 3) == scenic(size, int(patch))
    named = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}[size]
    name = f"adatape_{named}_patch{patch}_224"
    by_name = TrainConfig.of({"data": data, "recipe": "imagenet", "model_name": name})
    assert by_name.vit_config(1000, 3) == scenic(size, int(patch))
    assert TrainConfig.of_saved(vars(config)).vit_config(1000, 3) == scenic(size, int(patch))


def test_sizes_that_are_given_decide_what_depends_on_them():
    given = {"data": "imagefolder", "recipe": "imagenet", "heads": 4, "ffn": 80, "dim": 48}
    found = TrainConfig.of(given).vit_config(10, 3)
    assert (found.key_split, found.tape_mlp_dim, found.bank_patch_size) == (4, 80, 8)
    learn = TrainConfig.of({**given, "bank": "learn"}).vit_config(10, 3)
    assert (learn.bank, learn.bank_size) == ("learn", 1000)


def test_imagenet_is_scenic_s():
    config = TrainConfig.of({"data": "imagefolder", "recipe": "imagenet"})
    assert config.vit_config(1000, 3) == scenic("S", 16)
    steps = 300 * (1_281_167 // 4096)
    assert config.warmup_share * steps == pytest.approx(10_000)
    plan = config.with_batch_for(1_281_167).plan()
    made = TrainPlan(
        **{"epochs": 300, "batch": 4096, "learning_rate": 1e-3, "weight_decay": 0.1},
        **{"label_smoothing": 0.0, "max_grad_norm": 1.0, "loss": "sigmoid", "mixup": 0.5},
        warmup_share=config.warmup_share,
        decay_after_warmup=True,
    )
    assert plan == made
    for step, share in ((4_999, 0.5), (9_999, 1.0), (10_000, 1.0), ((steps + 10_000) // 2, 0.5)):
        assert plan.learning_rate_at(step, steps) == pytest.approx(1e-3 * share, rel=1e-3)
    assert 0 < plan.learning_rate_at(steps - 1, steps) < 1e-9
