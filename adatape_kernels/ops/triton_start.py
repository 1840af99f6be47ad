"""Whether Triton can start kernels on the GPU of this machine, asked before the first one.

Triton compiles a part of its driver with a C compiler when it is first used, and keeps it in its
cache. Triton 3.6 compiles a launcher for each kernel besides; 3.8 compiles nothing.
"""

import functools
import os
import shutil
import subprocess
import sysconfig
from importlib import import_module


@functools.cache
def why_triton_cannot_start() -> str | None:
    """Return why no kernel of Triton can be started here, in a line, or None if one can."""
    try:
        runtime = import_module("triton.runtime")
        _ = runtime.driver.active  # makes the driver
        launchers = hasattr(import_module("triton.backends.nvidia.driver"), "make_launcher")
    except Exception as error:
        why = _why_nothing_compiles() or f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"Triton cannot start: {why}"
    lacking = _why_nothing_compiles() if launchers else None
    return None if lacking is None else f"Triton cannot start kernels: {lacking}"


def _why_nothing_compiles() -> str | None:
    """Return what Triton lacks to compile C beside Python's headers, or None if it has all."""
    asked_for = os.environ.get("CC")
    known = ("gcc", "clang") if asked_for is None else (asked_for,)
    compiler = next(filter(None, map(shutil.which, known)), None)
    if compiler is None:
        return f"no C compiler was found ({' or '.join(known)}; CC names another)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = sysconfig.get_paths(scheme=scheme)["include"]
    command = [compiler, "-fsyntax-only", f"-I{headers}", "-x", "c", "-"]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} does not run ({type(error).__name__})"
    if done.returncode == 0:
        return None
    if "Python.h" in done.stderr:
        return "Python.h was not found (Debian and Ubuntu: python3-dev)"
    said = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
    return f"{compiler} does not compile ({said.strip()})"
