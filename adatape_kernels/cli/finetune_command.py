"""`adatape-kernels finetune`: a pretrained ViT fine-tuned without and with tapes, side by side."""

import argparse
from typing import Any

from adatape_kernels.cli.options import (
    add_backend,
    add_device,
    add_execution,
    add_loading,
    asked_device,
    asked_execution,
    asked_loading,
    chosen_backend,
)
from adatape_kernels.cli.train_command import add_options


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "finetune", help="fine-tune a pretrained ViT without and with tapes, and compare them"
    )
    add = parser.add_argument
    add(
        "--data", metavar="SET", help="digits, fashion-mnist, mnist, cifar10, imagefolder or shards"
    )
    add("--data-dir", metavar="FOLDER", help="the set's files, as in train")
    add(
        "--source",
        metavar="FILE",
        help="the ViT: a safetensors file of timm or torchvision, with --heads; default: one that "
        "is trained first",
    )
    add(
        "--source-epochs",
        type=int,
        metavar="N",
        help="number of passes over the training images for the source that is trained first",
    )
    add("--seeds", type=int, metavar="N", help="how often each kind is fine-tuned; default: 3")
    add("--out", default="adatape-finetune", metavar="FOLDER", help="default: %(default)s")
    add("--resume", action="store_true", help="go on with the comparison in --out")
    add_backend(parser)
    add_device(parser)
    add_execution(parser)
    add_loading(parser)
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, or go on with a comparison."""
    from adatape_kernels.recipes import finetune

    options, device = {**vars(arguments)}, asked_device(arguments)
    for name in ("command", "run", "backend", "device"):
        options.pop(name)
    ways: dict[str, Any] = {
        "execution": asked_execution(options),
        "loading": asked_loading(options),
    }
    names = ("data_dir", "source", "source_epochs", "seeds", "resume")
    others = {name: options.pop(name) for name in names}
    with chosen_backend(arguments.backend):
        finetune.run(options.pop("out"), options, **others, device=device, **ways)
    return 0
