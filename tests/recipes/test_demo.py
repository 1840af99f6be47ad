import json
import math

import matplotlib.image
import pytest
import torch
from checks import refused

from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, digits
from adatape_kernels.data.augment import turn_and_move
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.ops.op import BACKENDS, use_backend
from adatape_kernels.recipes import demo, measure
from adatape_kernels.recipes.machine import attention_backend
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.training.train_plan import TrainPlan

PAIRS = ("forward_seconds", "train_step_seconds", "rows", "flops", "peak_bytes")
PICTURES = ("heatmap", "tape_lengths", "shortest_longest", "costs")


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "ROUNDS", 2)
        assert main(["demo", "--epochs", "3", "--out", str(out)]) == 0
    return out


def test_the_report_has_its_keys_and_is_plausible(short_demo):
    report = json.loads((short_demo / "report.json").read_text())
    assert 0.3 < report["test_accuracy"] <= 1
    assert report["max_abs_logit_difference"] < 1e-3 or report["images_that_read_differently"]
    for name in PAIRS:
        assert set(report[name]) == {"elastic", "padded"}
        assert all(value > 0 for value in report[name].values())
    lengths = report["images_by_tape_length"]
    assert sum(lengths) == 360
    tape = sum(length * images for length, images in enumerate(lengths))
    assert report["rows"] == {"elastic": 360 * 5 + tape, "padded": 360 * 15}
    for name in ("rows", "flops", "peak_bytes"):
        assert report[name]["elastic"] < report[name]["padded"]
    assert report["torch"] == torch.__version__
    assert report["attention_backend"] in BACKENDS


def test_the_pictures_show_something(short_demo):
    for name in PICTURES:
        picture = matplotlib.image.imread(short_demo / f"{name}.png")
        assert picture.shape[0] > 300 and picture.shape[1] > 500
        assert picture[..., :3].std() > 0.05


def test_the_saved_model_loads(short_demo):
    from safetensors.torch import load_model

    model = AdaTapeViT(demo.CONFIG)
    assert load_model(model, short_demo / "model.safetensors") == (set(), [])


def test_a_second_run_with_the_same_seed_repeats_the_first(tmp_path, short_demo, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 2)
    demo.run(tmp_path, epochs=3)
    first, second = (
        json.loads((folder / "report.json").read_text()) for folder in (short_demo, tmp_path)
    )
    assert first["test_accuracy"] == second["test_accuracy"]
    assert first["images_by_tape_length"] == second["images_by_tape_length"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "epochs: expected 1 or more, got 0"),
        (["--out", __file__], "out: expected a folder, got the file"),
    ],
)
def test_bad_arguments_get_one_line_before_any_training(capsys, arguments, words):
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adatape-kernels: ") and error.count("\n") == 1
    assert words in error


def test_a_loss_that_is_not_finite_stops_the_training():
    data = digits()
    data.train_images.fill_(math.nan)
    plan = TrainPlan(epochs=1, batch=48, learning_rate=1e-3)
    with refused("loss", "epoch 1, step 1 of ", "nan", error=RuntimeError):
        train(AdaTapeViT(demo.CONFIG), data, plan, Normaliser.of(data.train_images), turn_and_move)


def test_flops_of_both_models_agree_with_a_count_by_hand():
    config, batch = demo.CONFIG, 6
    model = AdaTapeViT(config).eval()
    images = digits().test_images[:batch]
    with torch.no_grad():
        tape = int(model(images).tape_lens.sum())
        lens = (model(images).tape_lens + 5).tolist()
        counted = {
            "elastic": measure.flops(lambda: model(images)),
            "padded": measure.flops(lambda: model.padded()(images)),
        }
    dim = config.dim
    embed = 2 * batch * dim * (4 * 16 + 64 * 1 + 64 * dim + config.num_classes)

    def by_hand(tape, squares, read, scored):
        rows = 5 * batch + tape
        layer = 2 * rows * 4 * dim * dim + 4 * squares * dim
        layer += 2 * 5 * batch * 2 * dim * config.ffn_dim + 2 * tape * 3 * dim * config.tape_ffn_dim
        return embed + config.depth * layer + read + scored

    # A step scores 64 entries, and merges the keys and the values of those that it takes.
    key_dim, topk = dim // config.key_split, config.topk
    merged, scores = 2 * topk * dim, 2 * (64 + topk) * key_dim
    assert counted["elastic"] == by_hand(
        tape, sum(n * n for n in lens), merged * tape, scores * tape
    )
    # The padded model computes every tape token for every example.
    padded = batch * config.num_tape_tokens
    assert counted["padded"] == by_hand(
        padded,
        batch * (5 + config.num_tape_tokens) ** 2,
        merged * padded,
        scores * padded,
    )


def test_the_backend_is_the_one_that_ran():
    model, images = AdaTapeViT(demo.CONFIG), torch.zeros(1, 1, 8, 8)
    with use_backend("eager"):
        assert attention_backend(lambda: model(images)) == "eager"
    assert attention_backend(lambda: model.padded()(images)) == "none"


def test_peak_bytes_is_what_a_run_holds_at_once():
    def run():
        kept = torch.zeros(1000, dtype=torch.float32)
        for _ in range(5):
            torch.zeros(2000, dtype=torch.float32)
        return kept

    assert 12_000 <= measure.peak_bytes(run) <= 13_000


def test_timings_are_medians_of_interleaved_runs():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = measure.seconds(runs, rounds=5, warmup=1)
    assert order == ["a", "b"] * 6
    for timing in timings.values():
        assert 0 < timing.p20 <= timing.median <= timing.p80
