"""A forked program is to its tests what one of `subprocess` is."""

import os
import signal
import subprocess
import sys

import pytest
from checks import refused
from forked_python import CLOSED, Popen, run

FACTS = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("A"), __name__, "torch" in sys.modules]))
print("ä", end="")
print("words", file=sys.stderr)
sys.exit(7)
"""


def test_it_has_its_arguments_folder_variables_streams_and_exit_code(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FACTS)
    for arguments in (["-c", FACTS], [program], ["-m", "program"]):
        given = {"env": {**os.environ, "OMP_NUM_THREADS": "1", "A": "b"}, "cwd": tmp_path}
        done = run([*arguments, "x"], **given, capture_output=True, text=True)
        first = "-c" if arguments[0] == "-c" else str(program)
        expected = f'[["{first}", "x"], "{tmp_path}", "b", "__main__", '
        assert done.stdout == f"{expected}true]\nä", done.stderr
        assert (done.stderr, done.returncode) == ("words\n", 7)


@pytest.mark.parametrize("real", [True, False])
def test_streams_that_are_closed(tmp_path, real):
    """A forked program finds them as one that Python has started."""
    code = "import os, sys; words = [sys.stdin, sys.stdout, sys.stderr]; "
    code += "open(sys.argv[1], 'w').write(f'{words} {os.dup(0)}')"
    arguments = ["-c", code, tmp_path / "found"]
    if real:
        subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "", sys.executable, *arguments])
    else:
        run(arguments, stdin=CLOSED, stdout=CLOSED, stderr=CLOSED)
    assert (tmp_path / "found").read_text() == "[None, None, None] 1"


def test_a_signal_ends_it_alone_and_an_error_is_told():
    process = Popen(["-c", "import time; time.sleep(100)"])
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL
    process.kill()  # has no effect any more
    with pytest.raises(subprocess.TimeoutExpired):
        run(["-c", "import time; time.sleep(100)"], timeout=0.01)
    failed = run(["-c", "x = 1\nx.y"], capture_output=True, text=True)
    assert failed.returncode == 1 and "'int' object has no attribute 'y'" in failed.stderr
    interrupted = run(["-c", "import signal; signal.raise_signal(2)"], capture_output=True)
    assert interrupted.returncode == -signal.SIGINT and b"KeyboardInterrupt" in interrupted.stderr


def test_what_is_written_last_is_flushed_and_what_was_registered_called():
    code = "import atexit, sys; atexit.register(print, 'end'); sys.stdout.write('begin ')"
    assert run(["-c", code], capture_output=True, text=True).stdout == "begin end\n"


def test_what_a_begun_interpreter_would_not_heed_is_refused():
    others = {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": "/",
        "LC_ALL": "C",
        "TZ": "X",
        "MPLCONFIGDIR": "/",
    }
    for name, value in others.items():
        with refused("env", name, value):
            run(["-c", ""], env={**os.environ, "OMP_NUM_THREADS": "1", name: value})


def test_a_copy_of_the_package_is_found(tmp_path):
    package = tmp_path / "adatape_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("print('the copy,', __file__)")
    (tmp_path / "elsewhere").mkdir()
    code = "import sys, torch, adatape_kernels"
    starts = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import adatape_kernels'])"
    )
    for program in (code, starts):
        given = {"cwd": tmp_path / "elsewhere", "copy": tmp_path}
        done = run(["-c", program], **given, capture_output=True, text=True)
        assert done.stdout == f"the copy, {package / '__init__.py'}\n", done.stderr
