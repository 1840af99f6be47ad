"""The folder that a run writes into: whether it can be made and written, before hours of work."""

import contextlib
import os
import tempfile
from pathlib import Path

from adatape_kernels.data.printable import printable

_SHOWN_CHARACTERS = 200


def check_output_folder(out: Path) -> None:
    """Make a folder and a file in it, and take both back.

    Raises:
        ValueError: that cannot be done, or `out` is a file; the error names `out` in one line.
    """
    made: list[Path] = []
    try:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {printable(out)}")
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        descriptor, name = tempfile.mkstemp(dir=out)
        # Folders that a virtual machine shares keep a file that is open from being removed.
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise _not_usable(out, error.strerror or str(error)) from None
    except ValueError as error:
        if "out: " in str(error):
            raise
        raise _not_usable(out, str(error)) from None  # a name with a zero byte
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_run_folder(out: Path) -> None:
    """Raise ValueError, which names `out` in one line, where a run's folder cannot be read.

    Where there is none, loading the checkpoint says which file is missing.
    """
    try:
        next(out.iterdir(), None)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out: expected the folder of a run at {_shown(out)}, got {printable(reason)}"
        ) from None


def _not_usable(out: Path, reason: str) -> ValueError:
    return ValueError(
        f"out: expected a folder that can be made and written at {_shown(out)}, "
        f"got {printable(reason)}"
    )


def _shown(out: Path) -> str:
    return printable(out, _SHOWN_CHARACTERS)
