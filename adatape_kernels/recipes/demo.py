"""The demo: train a small AdaTape ViT on real digits, and compare it with the padded model."""

import contextlib
from pathlib import Path

import torch

from adatape_kernels.data import Normaliser, digits
from adatape_kernels.data.augment import turn_and_move
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.devices import chosen_device
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.model_comparison import ModelComparison
from adatape_kernels.recipes.model_report import write_report
from adatape_kernels.recipes.one_thread import one_thread
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.run_folder import claim, folder_argument
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.training.train_plan import TrainPlan

EPOCHS = 50
BATCH = 48
LEARNING_RATE = 3e-3
ROUNDS = 15

# The input is four patches of 4 x 4 pixels, the bank the 64 single pixels.
CONFIG = AdaTapeViTConfig(
    num_classes=10,
    dim=64,
    depth=2,
    num_heads=4,
    ffn_dim=128,
    tape_ffn_dim=64,
    key_split=2,
    image_size=8,
    in_channels=1,
    patch_size=4,
    bank_patch_size=1,
)


def run(
    out: str | Path = "adatape-demo",
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str = "float32",
) -> ModelComparison | None:
    """Train, compare, print a table, and write report.json, the model and pictures into `out`.

    Under torchrun the processes share each step, and rank 0 does the rest.

    Args:
        out: a folder, made if it is missing.
        epochs: number of passes over the 1,437 training images.
        seed: decides the split, the parameters and the batches.
        device: where to compute, as `devices.chosen_device` has it.
        dtype: what products are computed in, one of `execution.DTYPES`.

    Returns:
        What the table compares; None on other ranks than rank 0.

    Raises:
        ValueError: an argument is out of range, the device is not here, `out` cannot be made or
            written, or another process writes into it.
        OSError: a file cannot be written.
        RuntimeError: a package of the extra `demo` is missing, or the loss is not finite.
    """
    plan = TrainPlan(epochs=epochs, batch=BATCH, learning_rate=LEARNING_RATE, seed=seed)
    where = chosen_device(device)
    folder = folder_argument("out", out)
    pictures.require("demo")
    with lenient_output(), contextlib.ExitStack() as until_the_end, one_thread():
        ranks = until_the_end.enter_context(started(where))
        execution, run_folder = Execution(dtype, ranks=ranks), None
        ranks.check_agreement({"epochs": plan.epochs, "seed": plan.seed, "dtype": execution.dtype})
        if ranks.leads:
            # A folder that cannot be written shows here, before a minute of training.
            check_output_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            run_folder = until_the_end.enter_context(claim(folder))
        data = digits(plan.seed)
        normalise = Normaliser.of(data.train_images)
        torch.manual_seed(plan.seed)
        model = AdaTapeViT(CONFIG).to(where)
        train(
            model,
            data,
            plan,
            normalise,
            turn_and_move,
            title="training on digits",
            execution=execution,
        )
        if run_folder is None:
            return None
        entries = {"epochs": plan.epochs, "seed": plan.seed}
        return write_report(run_folder, model, data, normalise, entries, rounds=ROUNDS, dtype=dtype)
