"""What a trained model says of image files, and what each of them cost."""

import os
import time
from dataclasses import dataclass

import torch

from adatape_kernels.arguments import check_kind, check_path
from adatape_kernels.models.model_file import SavedModel
from adatape_kernels.models.value_checks import as_integer
from adatape_kernels.recipes.devices import wait


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Example:
        >>> from adatape_kernels.recipes.predict import Prediction
        >>> Prediction("a.png", (("cat", 0.9), ("dog", 0.1)), tape_tokens=3, milliseconds=1.5).best
        'cat'
    """

    file: str
    """The image's file."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes and their probabilities, the most probable first: the softmax of
    the logits, whatever loss the model was trained with."""
    tape_tokens: int
    """Number of tape tokens that the image read."""
    milliseconds: float
    """Time of the model on this image alone; decoding is not in it."""
    rows: int | None = None
    """Number of rows that all layers computed together, of a model whose rows halt."""

    @property
    def best(self) -> str:
        """The most probable class."""
        return self.top[0][0]


class Predictor:
    """Classifies image files by a trained model, one at a time.

    Args:
        model: a model that `adatape_kernels.load` returned, which knows its preprocessing.
        top: number of classes that are named; at most as many as there are.

    Raises:
        ValueError: the model knows no preprocessing, or `top` is below 1.
        TypeError: the model is of another class.
    """

    def __init__(self, model: SavedModel, *, top: int = 3):
        check_kind("model", model, SavedModel)
        if model.preprocessing is None:
            raise ValueError(
                "model: expected one that was saved with its preprocessing, got one without"
            )
        self.model, self.preprocessing = model.eval(), model.preprocessing
        count = model.config.num_classes
        self.top = min(as_integer("top", top, 1), count)
        self.class_names = model.class_names or tuple(map(str, range(count)))
        self._parameter = next(model.parameters())
        self._warm = False

    @torch.inference_mode()
    def __call__(self, file: str | os.PathLike[str]) -> Prediction:
        """Classify the image in a file.

        Raises:
            ValueError: this is no image that can be decoded; the error names the file.
            RuntimeError: Pillow is not installed.
        """
        device = self._parameter.device
        image = self.preprocessing.file(check_path("file", file)).to(device, self._parameter.dtype)
        if not self._warm:
            # What is done once, choosing kernels for instance, is no image's cost.
            self.model(image)
            self._warm = True
        wait(device)
        start = time.perf_counter()
        output = self.model(image)
        wait(device)
        milliseconds = 1e3 * (time.perf_counter() - start)
        best = output.logits[0].float().softmax(0).topk(self.top)
        shares = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Prediction(
            os.fspath(file),
            tuple((self.class_names[i], share) for i, share in shares),
            int(output.tape_lens[0]),
            milliseconds,
            None if output.halted is None else sum(output.halted.rows_per_step),
        )
