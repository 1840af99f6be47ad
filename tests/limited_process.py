"""Runs Python code in a process that may take only so much more memory than it has."""

from pathlib import Path

from forked_python import run

_PRELUDE = """
import resource, sys
import numpy, torch
import adatape_kernels.cli, adatape_kernels.data, adatape_kernels.recipes.verify
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1)) * (1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.path.insert(0, sys.argv.pop(1))
"""


def run_limited(code, *arguments, megabytes=700, seconds=120):
    """Run code, which finds the arguments in sys.argv[1:], and return what it printed."""
    tests = str(Path(__file__).parent)
    command = ["-c", _PRELUDE + code, str(megabytes), tests, *arguments]
    done = run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout
