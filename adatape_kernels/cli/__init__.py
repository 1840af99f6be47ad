"""The `adatape-kernels` command."""

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from adatape_kernels import __version__
from adatape_kernels.cli import info_command
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.op import BACKENDS, use_backend

EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_UNREADABLE, f"{self.prog}: {message} (--help lists what there is)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _Parser(prog="adatape-kernels", description="Elastic AdaTape for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info", help="versions, build facts, and which backend serves which calls on which device"
    )
    info.add_argument("--json", action="store_true", help="the same for programs")

    verify = commands.add_parser(
        "verify", help="compare with files of results that the public JAX code computed"
    )
    verify.add_argument("files", nargs="+", metavar="FILE.npz")
    add_backend(verify)
    verify.add_argument(
        "--device", help="cpu or cuda; default: cuda for the backends triton and cuda, if there"
    )

    check = commands.add_parser(
        "check",
        help="compare every kernel with float64 here: can this machine's results be trusted?",
    )
    check.add_argument("--device", help="cpu or cuda; default: cuda if it is there")

    demo = commands.add_parser("demo", help="train on real digits, compare elastic with padded")
    demo.add_argument(
        "--out", default="adatape-demo", metavar="FOLDER", help="default: %(default)s"
    )
    demo.add_argument("--epochs", type=int, help="default: about a minute on two cores")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    # The benchmarks have arguments of their own, in their folder.
    commands.add_parser("bench", help="measure every op beside its peers", add_help=False)

    train = commands.add_parser(
        "train", help="train on an image set from local files, with checkpoints"
    )
    add_train_arguments(train)

    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv[:1] if argv[:1] == ["bench"] else argv)
    try:
        if arguments.command == "bench":
            return run_bench(argv[1:])
        if arguments.command == "info":
            return info_command.run(as_json=arguments.json)
        if arguments.command == "verify":
            return verify_files(arguments.files, arguments.backend, arguments.device)
        if arguments.command == "check":
            return run_check(arguments.device)
        if arguments.command == "train":
            return run_train(arguments)
        return run_demo(arguments)
    except BrokenPipeError:  # the reader, a `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, RuntimeError, OSError) as error:
        print(f"adatape-kernels: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    except KeyboardInterrupt as stop:
        print(": ".join(["adatape-kernels: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return EXIT_INTERRUPTED


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Declare the option that `chosen_backend` reads."""
    parser.add_argument(
        "--backend",
        metavar="NAME[,FALLBACK]",
        help=f"{', '.join(BACKENDS)}, and who takes the calls that it does not serve, as in "
        "cuda,triton; default: the fastest that serves each call",
    )


def chosen_backend(text: str | None) -> contextlib.AbstractContextManager[None]:
    """Return `use_backend` for the names, of which the first is forced and the others fall back."""
    if text is None:
        return use_backend(None)
    name, *fallback = text.split(",")
    return use_backend(name, fallback)


def verify_files(files: Sequence[str], backend: str | None, device: str | None) -> int:
    """Check golden files; 0 all pass, 1 one is over tolerance, 2 one cannot be read."""
    from adatape_kernels.recipes.verify import verify_file

    if device is None:
        on_gpu = (
            backend is not None
            and backend.startswith(("triton", "cuda"))
            and torch.cuda.is_available()
        )
        device = "cuda" if on_gpu else "cpu"
    check_device(device)
    if (
        backend == "triton"
        and device == "cpu"
        and triton_runtime.INSTALLED
        and not triton_runtime.INTERPRETED
    ):
        print("triton on the CPU: its interpreter runs the kernels", flush=True)
        return in_interpreter("verify", *files, "--backend", backend, "--device", "cpu")
    code = 0
    with chosen_backend(backend):
        for file in files:
            try:
                report = verify_file(file, device)
            except ValueError as error:
                print(error, file=sys.stderr)
                code = EXIT_UNREADABLE
                continue
            print("\n".join(report.lines()))
            if not report.passed:
                code = max(code, EXIT_FAILED)
    return code


def check_device(name: str) -> None:
    """Raise ValueError unless this is a device that is here."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is here, got cuda, and torch finds no GPU")


def in_interpreter(*argv: str) -> int:
    """Run the command again where Triton's kernels run on the CPU; return its exit code.

    A process of its own, since triton decides when it is imported.
    """
    command = [sys.executable, "-m", "adatape_kernels.cli", *argv]
    # The interpreter's numpy warns of every NaN and infinity, which kernels have on purpose.
    settings = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    return subprocess.run(command, env={**os.environ, **settings}).returncode


def run_check(device: str | None) -> int:
    """Check every kernel on a device; 0 all passed, 1 one did not."""
    from adatape_kernels.recipes import check

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return 0 if check.run(device) else EXIT_FAILED


def run_bench(argv: Sequence[str]) -> int:
    """Run the benchmarks, which have arguments of their own."""
    # By name, since type checkers do not see that a clone has this package in a folder of its own.
    command = importlib.import_module("adatape_kernels.benchmarks.harness.command")
    return command.main(argv)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from adatape_kernels.recipes import demo

    epochs = demo.EPOCHS if arguments.epochs is None else arguments.epochs
    demo.run(arguments.out, epochs=epochs, seed=arguments.seed)
    return 0


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train`, whose defaults depend on the image set and stand with it."""
    add = parser.add_argument
    add("--data", metavar="SET", help="digits, fashion-mnist, mnist, cifar10 or imagefolder")
    add(
        "--data-dir",
        metavar="FOLDER",
        help="the set's files; default for fashion-mnist: where Debian's package puts them",
    )
    add("--out", default="adatape-train", metavar="FOLDER", help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add_backend(parser)
    model = parser.add_argument_group("model", "by default a small one that suits the set")
    model.add_argument("--variant", metavar="NAME", help="a ViT's size and patch, as in Ti/4")
    for name, kind, text in (
        ("image-size", int, "imagefolder: side that images are brought to, in pixels"),
        ("patch", int, "side of an input patch, in pixels"),
        ("bank-patch", int, "side of a bank patch, in pixels"),
        ("dim", int, "width of a token"),
        ("depth", int, "number of encoder layers"),
        ("heads", int, "number of attention heads"),
        ("ffn", int, "hidden width of the feed-forward for input rows"),
        ("num-tape-tokens", int, "most tape tokens that an image reads"),
        ("topk", int, "number of bank tokens that are merged into a tape token"),
        ("halt-threshold", float, "an image reads on while its halting score is below this"),
    ):
        model.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    training = parser.add_argument_group("training", "by default what suits the set")
    for name, kind, text in (
        ("epochs", int, "number of passes over the training images"),
        ("batch", int, "number of images in a step of the optimizer"),
        ("lr", float, "the highest learning rate"),
        ("weight-decay", float, "AdamW's weight decay"),
        ("seed", int, "decides the split, the parameters, the order and the augmentation"),
        ("limit", int, "number of training images that are used; default: all"),
    ):
        training.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def run_train(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run."""
    from adatape_kernels.recipes import train

    options = {**vars(arguments)}
    for name in ("command", "backend"):
        options.pop(name)
    out, data_dir, resume = (options.pop(name) for name in ("out", "data_dir", "resume"))
    with chosen_backend(arguments.backend):
        train.run(out, options, data_dir=data_dir, resume=resume)
    return 0


if __name__ == "__main__":
    sys.exit(main())
