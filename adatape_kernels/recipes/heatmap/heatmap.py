"""The command `heatmap`: pictures and numbers of what a trained model reads."""

import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adatape_kernels.arguments import check_path, shown
from adatape_kernels.data import ImageSet
from adatape_kernels.data.image_set import Images, evenly_spaced, unit_range
from adatape_kernels.data.printable import printable
from adatape_kernels.data.spoiled_images import blurred, noisy
from adatape_kernels.models import AdaTapeOutput, AdaTapeViT
from adatape_kernels.models.value_checks import as_flag
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.adatape_runs import (
    adatape_of_run,
    check_report_folder,
    names_of_runs,
)
from adatape_kernels.recipes.devices import chosen_device, device_of, moved
from adatape_kernels.recipes.heatmap import heatmap_pictures
from adatape_kernels.recipes.heatmap.read_statistics import (
    EntriesRead,
    LengthsRead,
    PlacesRead,
    correlation,
    entries_read,
    known,
    mean_of,
    places_read,
)
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.report_file import REPORT, json_bytes
from adatape_kernels.recipes.run_folder import RunFolder, claim, folder_argument
from adatape_kernels.recipes.run_images import images_of_run, normaliser_of
from adatape_kernels.recipes.terminal import lenient_output
from adatape_kernels.recipes.training.train_loop import epoch_generator, predict

NOISE, BLUR = 0.2, 1.0
"""Standard deviations of the noise, on images in 0 to 1, and of the blur, in pixels."""
_SPOILED_SEED = 0
_EXAMPLES = 12
_MOST_READ = 40
_MEAN_IMAGES = 200


@dataclass(frozen=True)
class _Spoiled:
    """Images that are made worse when they are used."""

    images: Images
    spoil: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.spoil(unit_range(self.images[indices]))


class _Looked(NamedTuple):
    """A model, its images, and what it says of them."""

    name: str
    model: AdaTapeViT
    data: ImageSet
    output: AdaTapeOutput


def run(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: Sequence[str | os.PathLike[str]] = (),
    beside: Sequence[str | os.PathLike[str]] = (),
    data_dir: str | os.PathLike[str] | None = None,
    show_images: bool = True,
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Look at what a model reads of the test images of its run, and write pictures into `out`.

    Args:
        source: the folder of a run of `train` or of the demo.
        out: a folder, made if it is missing.
        images: image files whose reads are drawn in place of those of some test images.
        beside: folders of further runs, drawn beside the first; their images are their own.
        data_dir: the folder of the first run's images; None for where they were.
        show_images: whether pictures show images of the set; False for images that may not be
            shown, and for pictures of what is read alone.
        device: where to compute, as `devices.chosen_device` has it.

    Returns:
        What report.json holds.

    Raises:
        ValueError: a folder holds no run of an AdaTape of images, an image cannot be decoded, or
            `out` cannot be written or is the folder of a run or of another command; the error names
            it.
        OSError: a file cannot be read or written.
        RuntimeError: a package of the extra `demo` is missing.
    """
    place = chosen_device(device)
    folder = folder_argument("out", out)
    as_flag("show_images", show_images)
    sources = [source, *beside]
    pictures.require("heatmap")
    check_output_folder(folder)
    check_report_folder(folder, ("reads", "lengths"))
    folders = [check_path("beside" if number else "run", s) for number, s in enumerate(sources)]
    names = names_of_runs(folders, again=True)
    first, *others = (
        _look("beside" if number else "run", each, name, None if number else data_dir, place)
        for number, (each, name) in enumerate(zip(folders, names, strict=True))
    )
    for each in [first, *others] if others else []:
        if _side(each.model) is None:
            raise ValueError(
                f"beside: expected runs whose bank is the image's patches, got {each.name}"
            )
    files = [check_path("images", file) for file in images]
    with pictures.plain_settings():
        drawn = _examples(first, files) if show_images or files else None
    folder.mkdir(parents=True, exist_ok=True)
    with lenient_output(), claim(folder) as writing, pictures.plain_settings():
        report: dict[str, Any] = {
            "run": printable(source),
            "images": len(first.data.test_labels),
            "class_names": list(first.data.class_names),
            "reads": _draw_reads(writing, first, show_images),
            "lengths": _draw_lengths(writing, first),
            "noise": NOISE,
            "blur": BLUR,
            **environment(place),
        }
        if drawn is not None:
            _write(writing, "examples", drawn)
        if others:
            report["beside"] = _draw_beside(writing, [first, *others], show_images)
        writing.write(REPORT, json_bytes(report))
        print(_told(report))
        print(f"pictures and report: {printable(folder)}{os.sep}")
    return report


def _look(
    argument: str,
    folder: Path,
    name: str,
    data_dir: str | os.PathLike[str] | None,
    device: torch.device,
) -> _Looked:
    """Load a run, and let its model predict its test images."""
    model = adatape_of_run(argument, folder, device)
    data = images_of_run(folder, None if data_dir is None else Path(data_dir))
    output = predict(model, data.test_images, normaliser_of(model))
    return _Looked(name, model, data, output)


def _side(model: AdaTapeViT) -> int | None:
    """Return the number of bank patches along either axis; None of a learnable bank."""
    c = model.config
    return c.image_size // c.bank_patch_size if c.bank == "input" else None


def _draw_reads(out: RunFolder, looked: _Looked, show_images: bool) -> list[dict[str, Any]]:
    """Draw every read; return what the report says of each."""
    names, labels = looked.data.class_names, looked.data.test_labels
    side, entries = _side(looked.model), []
    for layer, read in zip(looked.model.config.read_layers, looked.output.reads, strict=True):
        suffix = "" if len(looked.output.reads) == 1 else f"-layer{layer}"
        if side is not None:
            places = places_read(read, labels, len(names), side)
            classes = labels.unique().tolist()
            means, title = None, f"Which patches are read before layer {layer}"
            if show_images:
                means = [_mean(looked.data.test_images, labels == c) for c in classes]
                means.append(_mean(looked.data.test_images, labels == labels))
                title = f"Mean images, and which patches are read before layer {layer}"
            panels = heatmap_pictures.class_panels(places, classes, means, names)
            _write(out, f"heatmap{suffix}", heatmap_pictures.draw_panels(panels, title))
            _write(out, f"steps{suffix}", heatmap_pictures.draw_steps(places))
            entries.append({"layer": layer, **_places_entries(places)})
        else:
            found = entries_read(read, labels, len(names), looked.model.config.bank_size)
            _write(out, f"entries{suffix}", heatmap_pictures.draw_entries(found, names))
            entries.append({"layer": layer, **_entries_entries(found)})
    return entries


def _places_entries(places: PlacesRead) -> dict[str, Any]:
    return {
        "centre_share": known(places.centre_share),
        "uniform_share": places.uniform_share,
        "centre_share_by_step": [known(share) for share in places.centre_share_by_step.tolist()],
        "images_by_step": places.images_by_step.tolist(),
        "share_by_patch": places.over_all.tolist(),
    }


def _entries_entries(found: EntriesRead) -> dict[str, Any]:
    order = found.counts.argsort(descending=True, stable=True)[:_MOST_READ]
    most_read = [
        {
            "entry": entry,
            "count": int(found.counts[entry]),
            "counts_by_class": found.by_class[:, entry].tolist(),
        }
        for entry in order.tolist()
        if found.counts[entry]
    ]
    return {
        "dead_entries": found.dead,
        "bank_size": len(found.counts),
        "entropy_bits": found.entropy,
        "class_information_bits": found.class_information,
        "counts": found.counts.tolist(),
        "most_read": most_read,
    }


def _mean(images: Images, chosen: Tensor) -> Tensor:
    """Return the mean of some images where `chosen` is True, as it is for one at least."""
    numbers = chosen.nonzero()[:, 0]
    return unit_range(images[numbers[evenly_spaced(len(numbers), _MEAN_IMAGES)]]).mean(0)


def _draw_lengths(out: RunFolder, looked: _Looked) -> dict[str, Any]:
    """Measure tapes of clean, noisy and blurred images; draw and return their mean lengths."""
    data, output = looked.data, looked.output
    normaliser = normaliser_of(looked.model)
    generator = epoch_generator(_SPOILED_SEED, 0)

    with_noise, with_blur = (
        predict(looked.model, _Spoiled(data.test_images, spoil), normaliser).tape_lens
        for spoil in (lambda x: noisy(x, NOISE, generator), lambda x: blurred(x, BLUR))
    )
    right = output.logits.argmax(1) == data.test_labels
    losses = functional.cross_entropy(output.logits.float(), data.test_labels, reduction="none")
    lengths = LengthsRead(
        mean_of(output.tape_lens),
        mean_of(output.tape_lens[right]),
        mean_of(output.tape_lens[~right]),
        mean_of(with_noise),
        mean_of(with_blur),
        correlation(output.tape_lens, losses),
    )
    _write(out, "lengths", heatmap_pictures.draw_lengths(lengths))
    return lengths.entries()


def _examples(looked: _Looked, files: Sequence[Path]) -> Any:
    """Return a figure of single images and what each read first, None for a learnable bank."""
    side, preprocessing = _side(looked.model), looked.model.preprocessing
    assert preprocessing is not None
    if side is None:
        if files:
            raise ValueError(
                "images: expected none for a learnable bank, whose entries are no places, "
                f"got {shown([printable(file) for file in files])}"
            )
        return None
    if files:
        inputs = torch.cat([preprocessing.file(file) for file in files])
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        pixels = [(image * std + mean).clamp(0, 1) for image in inputs]
        titles = [pictures.drawn_name(file.name) for file in files]
        with torch.no_grad():
            output = looked.model.eval()(moved(inputs, device_of(looked.model)))
        read = output.to("cpu").reads[0]
    else:
        data = looked.data
        chosen = evenly_spaced(len(data.test_labels), _EXAMPLES)
        pixels = list(unit_range(data.test_images[chosen]))
        titles = [
            pictures.drawn_name(data.class_names[int(data.test_labels[i])]) for i in chosen.tolist()
        ]
        read = TapeSelection(*(part[chosen] for part in looked.output.reads[0]))
    return heatmap_pictures.draw_examples(pixels, titles, read, side)


def _draw_beside(
    out: RunFolder, looked: Sequence[_Looked], show_images: bool
) -> list[dict[str, Any]]:
    """Draw what several models read over all their images, side by side."""
    panels, entries = [], []
    patches = [(each.model.config.patch_size, each.model.config.bank_patch_size) for each in looked]
    for each in looked:
        side = _side(each.model)
        assert side is not None
        labels = each.data.test_labels
        places = places_read(each.output.reads[0], labels, each.data.num_classes, side)
        mean = _mean(each.data.test_images, labels == labels) if show_images else None
        c = each.model.config
        title = f"input /{c.patch_size}, bank /{c.bank_patch_size}"
        if patches.count((c.patch_size, c.bank_patch_size)) > 1:
            title = f"{pictures.drawn_name(each.name)}\n{title}"
        panels.append(heatmap_pictures.Panel(title, mean, places.over_all))
        entries.append({"run": each.name, "patch": c.patch_size, **_places_entries(places)})
    title = "Which bank patches are read, model by model"
    figure = heatmap_pictures.draw_panels(panels, title, relative=True)
    _write(out, "beside", figure)
    return entries


def _write(out: RunFolder, name: str, figure: Any) -> None:
    content = io.BytesIO()
    # A glyph that the font lacks is drawn as a box, which is no reason for a warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(content, dpi=130)
    out.write(f"{name}.png", content.getvalue())


def _told(report: dict[str, Any]) -> str:
    """Return the report in words."""
    lines = [""]
    for read in report["reads"]:
        where = f"read before layer {read['layer']}: "
        if "dead_entries" in read:
            lines.append(
                f"{where}{read['dead_entries']:,} of {read['bank_size']:,} entries are never read, "
                f"entropy {read['entropy_bits']:.2f} bits; an entry that is read tells "
                f"{read['class_information_bits']:.2f} bits of the class"
            )
        elif read["centre_share"] is None:
            lines.append(f"{where}nothing")
        else:
            lines.append(
                f"{where}{read['centre_share']:.1%} of the reads fall on the middle quarter of the "
                f"image, which has {read['uniform_share']:.1%} of the patches"
            )
    told = {
        "mean": "of all images",
        "right": "classified right",
        "wrong": "classified wrong",
        "noisy": "with noise",
        "blurred": "blurred",
    }
    lengths = report["lengths"]
    lines += [
        f"tape tokens {words:17} {lengths[name]:6.2f}"
        for name, words in told.items()
        if lengths[name] is not None
    ]
    if lengths["correlation_with_loss"] is not None:
        lines.append(f"correlation of tape length and loss {lengths['correlation_with_loss']:6.2f}")
    return "\n".join(lines)
