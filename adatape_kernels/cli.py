"""The `adatape-kernels` command."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from adatape_kernels import __version__
from adatape_kernels._build import build_facts
from adatape_kernels.backend import BACKENDS, explain, registered_ops, serving, use_backend

EXIT_FAILED, EXIT_UNREADABLE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="adatape-kernels", description="Elastic AdaTape for PyTorch."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="versions, build facts, and which backend serves each op")

    verify = commands.add_parser("verify", help="check golden files of the public JAX code")
    verify.add_argument("files", nargs="+", metavar="FILE.npz")
    verify.add_argument("--backend", help=f"one of {', '.join(BACKENDS)}; default: the fastest")

    demo = commands.add_parser("demo", help="train on real digits, compare elastic with padded")
    demo.add_argument(
        "--out", default="adatape-demo", metavar="FOLDER", help="default: %(default)s"
    )
    demo.add_argument("--epochs", type=int, help="default: about a minute on two cores")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            return info()
        if arguments.command == "verify":
            return verify_files(arguments.files, arguments.backend)
        return run_demo(arguments)
    except BrokenPipeError:  # the reader, a `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, RuntimeError, OSError) as error:
        print(f"adatape-kernels: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    except KeyboardInterrupt:
        print("adatape-kernels: interrupted", file=sys.stderr)
        return 130


def info() -> int:
    """Print versions, build facts, and which backend serves each op and why the others do not."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    triton = "installed" if find_spec("triton") else "not installed"
    print(f"adatape-kernels {__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {cuda}, triton {triton}")
    print("\ncompiled part")
    for name, value in build_facts().items():
        print(f"  {name:<18}{value}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nops on {device} in float32 (* serves by default)")
    print(f"  {'':<23}" + "".join(f"{backend:<9}" for backend in BACKENDS))
    reasons: list[str] = []
    for op in registered_ops():
        chosen = serving(op, device, torch.float32)
        cells = []
        for backend, reason in explain(op, device, torch.float32).items():
            if reason == "serves":
                cells.append("yes *" if backend == chosen else "yes")
            else:
                reasons += [] if reason in reasons else [reason]
                cells.append(f"no ({reasons.index(reason) + 1})")
        print(f"  {op:<23}" + "".join(f"{cell:<9}" for cell in cells))
    for number, reason in enumerate(reasons, start=1):
        print(f"  ({number}) {reason}")
    return 0


def verify_files(files: Sequence[str], backend: str | None) -> int:
    """Check golden files; 0 all pass, 1 one is over tolerance, 2 one cannot be read."""
    from adatape_kernels.recipes.verify import verify_file

    code = 0
    with use_backend(backend):
        for file in files:
            try:
                report = verify_file(file)
            except ValueError as error:
                print(error, file=sys.stderr)
                code = EXIT_UNREADABLE
                continue
            print("\n".join(report.lines()))
            if not report.passed:
                code = max(code, EXIT_FAILED)
    return code


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from adatape_kernels.recipes import demo

    epochs = demo.EPOCHS if arguments.epochs is None else arguments.epochs
    demo.run(arguments.out, epochs=epochs, seed=arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
