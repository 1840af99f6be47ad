"""The report of a trained model: accuracy, and its cost beside that of the padded model."""

import os
from typing import Any

from adatape_kernels.data.image_set import ImageSet, Normaliser
from adatape_kernels.data.preprocessing import Preprocessing
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeViTConfig, ImageClassifier
from adatape_kernels.models.model_file import FILE, serialised
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.devices import device_of
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.model_comparison import ModelComparison, compare
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder


def write_report(
    out: RunFolder,
    model: ImageClassifier,
    data: ImageSet,
    normalise: Normaliser,
    entries: dict[str, Any],
    *,
    rounds: int,
    dtype: str = "float32",
) -> ModelComparison:
    """Compare, print a table, and write report.json, model.safetensors and pictures into `out`.

    Args:
        out: what writes into the folder.
        model: the trained model.
        data: its test half is used.
        normalise: what the model was trained with.
        entries: what else report.json should hold.
        rounds: number of times that each timing is repeated.
        dtype: what products are computed in, one of `execution.DTYPES`.

    Raises:
        OSError: a file cannot be written.
    """
    comparison, output = compare(model, data, normalise, rounds, dtype)
    report = {**comparison.report(), **entries, **environment(device_of(model))}
    out.write(REPORT, json_bytes(report))
    preprocessing = Preprocessing.of(model.config.image_size, normalise)
    content = serialised(model, class_names=data.class_names, preprocessing=preprocessing)
    out.write(FILE, content)
    # Only a bank that is made of the image has tokens that can be shown in it.
    config, patch = model.config, None
    if isinstance(config, AdaTapeViTConfig) and config.bank == "input":
        patch = config.bank_patch_size
    pictures.draw_all(out, data, output, comparison, patch)
    print(table(comparison))
    print(f"pictures, report and model: {printable(out.folder)}{os.sep}")
    return comparison


def table(comparison: ModelComparison) -> str:
    """Return the comparison as text."""
    batch = f"{comparison.compared_images} test images, one batch"
    differ = "read" if comparison.rows_by_layer is None else "halted"
    work = f"images x tape tokens           {_describe(comparison.images_by_tape_length)}"
    if comparison.rows_by_layer is not None:
        rows = ", ".join(f"{rows:,d}" for rows in comparison.rows_by_layer)
        work = f"rows computed by each layer    {rows}"
    errors = []
    if comparison.errors is not None:
        elastic, padded = comparison.errors["elastic"], comparison.errors["padded"]
        errors = [
            f"{comparison.dtype} beside float32            {elastic:8.1e}"
            f"   (the padded model: {padded:.1e})"
        ]
    lines = [
        "",
        f"test accuracy                  {comparison.test_accuracy:8.2%}",
        f"largest difference of logits   {comparison.max_abs_logit_difference:8.1e}"
        f"   ({comparison.images_that_read_differently} images {differ} differently)",
        *errors,
        work,
        "",
        f"{batch:30} {'elastic':>10} {'padded':>10} {'padded/elastic':>15}",
    ]
    for cost in comparison.costs():
        shown = f"{cost.elastic / cost.unit:10,.1f} {cost.padded / cost.unit:10,.1f}"
        lines.append(f"{cost.label:30} {shown} {cost.padded / cost.elastic:14.2f}x")
    if comparison.attention_backend == "eager":
        lines += [
            "",
            "The ops ran on the eager reference, an exact loop over the examples: times show its",
            "overhead, rows and FLOPs the work that is saved.",
        ]
    return "\n".join(lines)


def _describe(images_by_tape_length: list[int]) -> str:
    return ", ".join(f"{n} x {length}" for length, n in enumerate(images_by_tape_length) if n)
