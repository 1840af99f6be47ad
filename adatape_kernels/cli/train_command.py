"""`adatape-kernels train`: training on an image set from local files."""

import argparse
from typing import Any

from adatape_kernels.cli.options import (
    add_backend,
    add_device,
    add_dtype,
    add_execution,
    add_loading,
    asked_device,
    asked_execution,
    asked_loading,
    chosen_backend,
    numbers,
)
from adatape_kernels.op_types import ACTIVATIONS


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train", help="train on an image set from local files, with checkpoints"
    )
    _add_arguments(parser)
    parser.set_defaults(run=run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train`, whose defaults depend on the image set and stand with it."""
    add = parser.add_argument
    add(
        "--data", metavar="SET", help="digits, fashion-mnist, mnist, cifar10, imagefolder or shards"
    )
    add(
        "--data-dir",
        metavar="FOLDER",
        help="the set's files; default for fashion-mnist: where Debian's package puts them",
    )
    add("--out", default="adatape-train", metavar="FOLDER", help="default: %(default)s")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, up to --epochs where it is given",
    )
    add(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="write scalars and pictures into the folder tensorboard within --out",
    )
    add(
        "--source",
        metavar="FILE",
        help="begin with a pretrained ViT: a safetensors file of timm or torchvision; with --heads",
    )
    add(
        "--init",
        metavar="PATH",
        help="begin with a model of this package: a file that save or train wrote, or a run",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="whole defaults by name: small, for fashion-mnist and cifar10 on two cores, or "
        "imagenet, scenic's for AdaTape S/16 on ImageNet's folders or shards",
    )
    add_backend(parser)
    add_device(parser)
    add_execution(parser)
    add_loading(parser)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that decide the curve, by the fields of TrainConfig."""
    model = parser.add_argument_group("model", "by default a small one that suits the set")
    model.add_argument(
        "--model",
        dest="model_name",
        metavar="NAME",
        help="adatape, vit, uvit, u2t or avit, or a whole name as list_models() has it; "
        "default: adatape",
    )
    model.add_argument("--variant", metavar="NAME", help="a ViT's size and patch, as in Ti/4")
    for name, kind, text in (
        ("image-size", int, "imagefolder, shards: side that images are brought to"),
        ("patch", int, "side of an input patch, in pixels"),
        ("bank-patch", int, "side of a bank patch, in pixels"),
        ("dim", int, "width of a token"),
        ("depth", int, "number of encoder layers"),
        ("heads", int, "number of attention heads"),
        ("ffn", int, "hidden width of the feed-forward for input rows"),
        ("num-tape-tokens", int, "most tape tokens that an image reads; 0 for a ViT without tape"),
        ("bank-size", int, "number of tokens of a learnable bank"),
        ("topk", int, "number of bank tokens that are merged into a tape token"),
        ("halt-threshold", float, "an image reads on while its halting score is below this"),
        ("ponder-weight", float, "factor of the ponder loss, which charges reading or halting"),
        ("act-epsilon", float, "uvit, u2t, avit: what halts has a score above 1 - N"),
        ("distinct-layers", int, "uvit, u2t: number of layers that take turns; 0 for one a step"),
        ("gate-scale", float, "avit: factor of a token's first feature in its probability to halt"),
        ("gate-center", float, "avit: what is taken away from that product"),
        ("distribution-weight", float, "avit: factor of the distribution loss"),
    ):
        model.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    model.add_argument(
        "--activation",
        metavar="NAME",
        help=f"of the feed-forward for input rows: {', '.join(ACTIVATIONS)}",
    )
    model.add_argument(
        "--bank",
        metavar="KIND",
        help="what the tape is read from: input, the image's own patches, or learn, learned tokens",
    )
    for name, text in (
        ("act-level", "uvit, u2t: what halts on its own, example or row"),
        ("leave", "uvit, u2t: whether rows leave with their example or each at once, as row"),
    ):
        model.add_argument(f"--{name}", metavar="KIND", help=text)
    training = parser.add_argument_group("training", "by default what suits the set")
    training.add_argument(
        "--halt-threshold-range",
        type=numbers,
        metavar="X,X",
        help="draw the halting threshold of each training step from this range, so that the model "
        "can be run at any; it is tested at --halt-threshold",
    )
    for name, kind, text in (
        ("epochs", int, "number of passes over the training images"),
        ("batch", int, "number of images in a step; at most a tenth of the set by default"),
        ("lr", float, "the highest learning rate"),
        ("weight-decay", float, "AdamW's weight decay"),
        ("seed", int, "decides the split, the parameters, the order and the augmentation"),
        ("split-seed", int, "decides the split and the --limit in the place of --seed"),
        ("limit", int, "number of training images that are used; default: all"),
    ):
        training.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    add_dtype(training)
    add_regularisation(parser)


def add_regularisation(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the loss and the regularisation."""
    group = parser.add_argument_group("loss and regularisation")
    group.add_argument(
        "--loss",
        metavar="KIND",
        help="cross entropy of all classes' softmax, or of each class's sigmoid, as scenic has it",
    )
    for name, kind, text in (
        ("label-smoothing", float, "share of the target that is spread over all classes"),
        ("mixup", float, "mix images by shares of Beta(N, N); 0 for none"),
        ("randaugment", int, "number of RandAugment's operations on an image; 0 for none"),
        ("randaugment-magnitude", int, "how strong they are, 1 to 29, kornia's scale"),
        ("random-erasing", float, "probability with which noise overwrites a part of an image"),
        (
            "ema",
            float,
            "evaluate and write a moving average of the parameters that keeps N of "
            "itself at a step, as in 0.999; 0 for none",
        ),
        ("max-grad-norm", float, "norm that a larger gradient is scaled down to; 0 for none"),
        ("warmup-share", float, "share of all steps in which the learning rate rises"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run."""
    from adatape_kernels.recipes.training import train

    options, device = {**vars(arguments)}, asked_device(arguments)
    for name in ("command", "run", "backend", "device"):
        options.pop(name)
    out, resume = options.pop("out"), options.pop("resume")
    files = {name: options.pop(name) for name in ("data_dir", "source", "init", "tensorboard")}
    with chosen_backend(arguments.backend):
        execution = asked_execution(options)
        loading = asked_loading(options)
        ways: dict[str, Any] = {"device": device, "execution": execution, "loading": loading}
        train.run(out, options, **files, resume=resume, **ways)
    return 0
