"""Reads changed files, and sees whether a change is noticed and told in one line."""

import contextlib
import io
import tempfile
from pathlib import Path

from fuzz.byte_mutations import mutated, random_mutations
from fuzz.file_formats import FORMATS, read, whole
from fuzz.isolation import peak_bytes
from fuzz.made_files import made, random_made
from fuzz.verdict import Fault, check_refusal

MOST_BYTES = 200 << 20
"""Memory that reading a changed file of these sizes may take."""
_CHECKED = ("checkpoint",)
"""Formats that hold checksums, so that no change of a byte may pass."""


def random_case(rng):
    """Return a format and what is changed in one of its files."""
    name = rng.choice(FORMATS)
    parts = random_made(rng, name) if rng.random() < 0.35 else None
    return {
        "area": "files",
        "format": name,
        "seed": 0,
        "file": rng.randrange(8),
        "made": parts,
        "mutations": [] if parts else random_mutations(rng),
    }


def run_case(case):
    """Write the files and read them; return whether they could be read. Raises Fault."""
    name = case["format"]
    files, must_fail = whole(name), False
    if case["made"]:
        files, must_fail = made(files, case["made"])
    changed = sorted(files)[case["file"] % len(files)]
    content = files[changed]
    for mutation in case["mutations"]:
        content = mutated(content, mutation)[: 8 << 20]
    if content != files[changed]:
        must_fail = must_fail or name in _CHECKED
        files = files | {changed: content}
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            path = Path(folder) / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        _read_whole_once(name)
        before = peak_bytes()
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                result = read(name, Path(folder))
        except Exception as error:
            check_refusal(error, (ValueError, OSError))
            _check_message(name, str(error), folder)
            return {"valid": False}
        finally:
            grown = peak_bytes() - before
            if grown > MOST_BYTES:
                raise Fault("memory", f"reading took {grown >> 20} MiB")
    passed = getattr(result, "passed", True)
    if must_fail and passed:
        raise Fault("accepted a changed file", f"{changed}: {case['made'] or case['mutations']}")
    return {"valid": True}


_read_before = set()


def _read_whole_once(name):
    """Read whole files first: what imports cost is no matter of the changed ones."""
    if name in _read_before:
        return
    _read_before.add(name)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in whole(name).items():
            path = Path(folder) / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()):
            read(name, Path(folder))


def _check_message(name, text, folder):
    if "MemoryError" in text or "allocate" in text:
        raise Fault("asked for too much memory", text)
    if name in _CHECKED:
        return  # an option out of range is told as the command line tells it
    if Path(folder).name not in text and "data-dir" not in text:
        raise Fault("names no file", text)
