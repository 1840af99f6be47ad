"""`adatape-kernels compare`: AdaTape beside other models, accuracy against speed and FLOPs."""

import argparse
from typing import Any

from adatape_kernels.cli.options import (
    add_backend,
    add_device,
    add_loading,
    asked_device,
    asked_loading,
    chosen_backend,
    integers,
    names,
)

_MODELS = "adatape-input,adatape-learn,vit,uvit,u2t,avit"
_BUDGET = "20m"


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare", help="train several models at several sizes, accuracy against speed and FLOPs"
    )
    add = parser.add_argument
    add(
        "--data",
        default="fashion-mnist",
        metavar="SET",
        help="digits, fashion-mnist, mnist, cifar10, imagefolder or shards; default: %(default)s",
    )
    add(
        "--data-dir",
        metavar="FOLDER",
        help="the set's files; default for fashion-mnist: where Debian's package puts them",
    )
    add(
        "--models",
        type=names,
        default=names(_MODELS),
        metavar="NAME,NAME",
        help=f"default: all, {_MODELS}",
    )
    add(
        "--sizes",
        type=integers,
        default=(2, 4, 6),
        metavar="N,N",
        help="numbers of layers, of steps of uvit and u2t; default: 2,4,6",
    )
    add(
        "--seeds",
        type=integers,
        default=(0, 1),
        metavar="N,N",
        help="each is a run of each model of each size; default: 0,1",
    )
    add(
        "--budget",
        metavar="TIME",
        help="how long all of it may take, as in 90s, 20m or 1h30m, by which the number of epochs "
        f"is chosen; default: {_BUDGET}",
    )
    add("--epochs", type=int, metavar="N", help="passes over the training images, not by a budget")
    add("--limit", type=int, metavar="N", help="number of training images; default: all")
    add("--out", default="adatape-compare", metavar="FOLDER", help="default: %(default)s")
    for name, kind, text in (
        ("image-size", int, "imagefolder, shards: side that images are brought to, in pixels"),
        ("patch", int, "side of an input patch, in pixels"),
        ("bank-patch", int, "side of a bank patch of AdaTape, in pixels"),
        ("dim", int, "width of a token"),
        ("heads", int, "number of attention heads"),
        ("ffn", int, "hidden width of the feed-forward for input rows"),
        ("batch", int, "number of images in a step"),
        ("lr", float, "the highest learning rate"),
    ):
        add(f"--{name}", type=kind, metavar="N", help=f"{text}; default: that of train")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="timed passes over the test images, all models in turn; default: %(default)s",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time, a thread each; default: one a core, and 1 on a GPU",
    )
    add_backend(parser)
    add_device(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train and measure, or what is missing of it."""
    from adatape_kernels.recipes.compare import compare
    from adatape_kernels.recipes.compare.compare_config import (
        SHARED_OPTIONS,
        CompareConfig,
        seconds_of,
    )

    text = arguments.budget
    if text is None and arguments.epochs is None:
        text = _BUDGET
    config = CompareConfig(
        **{
            name: getattr(arguments, name)
            for name in ("data", "models", "sizes", "seeds", "epochs", "limit", "rounds")
        },
        budget=None if text is None else seconds_of(text),
        options={name: getattr(arguments, name) for name in SHARED_OPTIONS},
    )
    backends = arguments.backend.split(",") if arguments.backend else ()
    with chosen_backend(arguments.backend):  # which says what is wrong with the names
        compare.run(
            arguments.out,
            config,
            data_dir=arguments.data_dir,
            jobs=arguments.jobs,
            backends=backends,
            device=asked_device(arguments),
            loading=asked_loading({**vars(arguments)}),
        )
    return 0
