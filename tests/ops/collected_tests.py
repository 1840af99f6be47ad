"""The tests that instruction sets run once more, collected once and run in processes of their own.

`run` asks a program for such a process, as `python collected_tests.py FACTS OPTIONS` starts it, and
each is forked where all tests have been collected and no kernel has been chosen yet: so variables
that the kernels read when the first one is asked for, such as ADATAPE_CPU, are still heeded. FACTS
are those of the compiled part, as JSON; to ask that part itself would choose.
"""

import atexit
import functools
import gc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# They run these tests themselves.
_LEFT_OUT = ("test_instruction_sets.py", "test_emulated_tiles.py")
_OPTIONS = "-q --capture=sys -p no:cacheprovider -p no:faulthandler -m instruction_sets".split()


def run(words=(), tiles=None, **variables):
    """Run the tests in a process of their own.

    Args:
        words: those are run alone whose name, or a marker of theirs, has one of them in it.
        tiles: a library that emulates tiles, for attention's kernels for AMX.
        variables: of the environment, beside this process's.

    Returns:
        The exit code, and what was printed. Its first line names the kernels that were chosen.
    """
    server = _server()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        request = {"words": words, "tiles": tiles and str(tiles), "variables": variables}
        server.stdin.write(json.dumps({**request, "output": output.name}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the tests could not be collected: exit code {server.wait()}"
        return int(answer), output.read()


@functools.cache
def _server():
    from adatape_kernels._build import build_facts

    facts = json.dumps(build_facts())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, __file__, facts],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end():
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return process


def _load_compiled_part(facts):
    """Load the compiled part, ahead of the package, and let it have these facts; return its own."""
    (package,) = importlib.util.find_spec("adatape_kernels").submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec("adatape_kernels._C", [package])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own, module.build_facts = module.build_facts, lambda: dict(facts)
    return module, own


class Requests:
    """Forks a process for each request, which runs tests of those that pytest has collected."""

    def __init__(self, module, own_facts):
        self.module, self.own_facts = module, own_facts
        self.requests, self.answers = os.fdopen(os.dup(0)), os.dup(1)
        self.tiles = None
        # What collects has nothing to say to whoever reads the answers.
        os.dup2(2, 1)

    def pytest_collection(self):
        import selection

        selection.BACKENDS = ("cpp",)  # no other case is marked for instruction sets

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Return True in the process that forks, when nobody asks any more."""
        assert session.items and not session.testsfailed
        gc.freeze()
        for line in self.requests:
            child = os.fork()
            if not child:
                self.prepare(session, json.loads(line))
                return None  # pytest's own loop runs the items
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(self.answers, b"%d\n" % code)
        return True

    def prepare(self, session, request):
        output = os.open(request["output"], os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request["variables"])
        self.module.build_facts = self.own_facts
        os.write(1, f"cpu kernels: {self.own_facts()['cpu_kernels']}\n".encode())
        if request["tiles"]:
            import emulation

            self.tiles = request["tiles"]
            emulation.load_emulated_tiles(self.tiles)
        words = request["words"]
        # A test of which C++ has no case is there once, to say so.
        items = [item for item in session.items if not item.get_closest_marker("skip")]
        session.items[:] = [item for item in items if not words or _has_one(item, words)]


def _has_one(item, words):
    names = (item.nodeid.partition(HERE.name + "/")[2], *(m.name for m in item.iter_markers()))
    return any(word in name for word in words for name in names)


def _serve(facts):
    """The exit code of this process, or of one that was forked from it."""
    torch.set_num_threads(1)
    requests = Requests(*_load_compiled_part(facts))
    ignored = [f"--ignore={HERE / name}" for name in _LEFT_OUT]
    code = pytest.main([*_OPTIONS, *ignored, str(HERE)], plugins=[requests])
    if requests.tiles is not None:
        import emulation

        print("tiles:", json.dumps(emulation.tile_counts(requests.tiles)._asdict()))
    return code


if __name__ == "__main__":
    sys.exit(_serve(json.loads(sys.argv[1])))
