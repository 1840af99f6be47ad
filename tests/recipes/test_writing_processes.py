"""Processes that write into the folder of a run: a dead one blocks nobody, and no file stays.

Processes are forked from one that has a single thread of torch, so that a trial takes milliseconds.
"""

import textwrap

import pytest
from forked_python import run

WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from adatape_kernels.recipes import checkpoint, checkpoint_index, run_folder
from adatape_kernels.recipes.checkpoint import INDEX, Checkpoint

folder = Path(sys.argv[1])

def save(run, epoch):
    rows = [{"epoch": number + 1} for number in range(epoch)]
    tensors = {"weight": torch.full((2000,), float(epoch))}
    checkpoint.save(run, Checkpoint(epoch, epoch, {}, {}, rows, {}, tensors))

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child

def check(*epochs):
    found = checkpoint.load(folder)
    assert found.epoch in epochs, (found.epoch, epochs)
    assert found.tensors["weight"].eq(float(found.epoch)).all()
    return found.epoch

def names():
    return {file.name for file in folder.iterdir()}
"""


def by_a_writer(folder, script):
    """Run a script below WRITER in a process of its own."""
    words = ["-c", WRITER + textwrap.dedent(script), str(folder)]
    found = run(words, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_a_death_at_any_line_leaves_a_checkpoint_and_nothing_that_stays(tmp_path):
    """What is on the disk at a line is what a death leaves there: nothing is tidied up or flushed.

    A process that writes is not ended at each of its lines, then, but the files are copied there.
    """
    counts = by_a_writer(
        tmp_path,
        """
        import pickle
        FILES = (run_folder.__file__, checkpoint.__file__, checkpoint_index.__file__)

        def on_the_disk():
            return {file.name: file.read_bytes() for file in folder.iterdir()}

        def work():
            def trace(frame, event, argument):
                if frame.f_code.co_filename not in FILES:
                    return None
                if event == "line":
                    files = on_the_disk()
                    if not found or found[-1][1] != files:
                        found.append([0, files])
                    found[-1][0] += 1
                return trace

            found = []
            sys.settrace(trace)
            with run_folder.claim(folder) as run:
                checkpoint.remove_leftovers(run)
                save(run, epoch + 1)
            sys.settrace(None)
            found.append([1, on_the_disk()])
            states.write_bytes(pickle.dumps(found))

        states, folder = folder / "states", folder / "run"
        folder.mkdir()
        lines, after, before = 0, 0, 0
        for epoch in (1, 9):
            with run_folder.claim(folder) as run:
                save(run, epoch)
            _, status = os.waitpid(forked(work), 0)
            assert status == 0 and check(epoch + 1)
            for number, (count, files) in enumerate(pickle.loads(states.read_bytes())):
                for name in names():
                    (folder / name).unlink()
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                saved = check(epoch, epoch + 1)
                with run_folder.claim(folder) as run:
                    checkpoint.remove_leftovers(run)
                assert check(saved)
                left = {INDEX, f"checkpoint-{saved}.safetensors"}
                assert names() == left, (number, [*files], names())
                with run_folder.claim(folder) as run:
                    save(run, saved + 1)
                assert check(saved + 1)
                lines += count
                after, before = after + count * (saved > epoch), before + count * (saved == epoch)
        print(lines, after, before, number)
        """,
    )
    lines, after, before, states = map(int, counts.split())
    assert lines > 200 and after > 10 and before > 100 and states > 5


def test_a_process_that_is_killed_at_any_time_leaves_a_checkpoint(tmp_path):
    by_a_writer(
        tmp_path,
        """
        def work():
            with run_folder.claim(folder) as run:
                checkpoint.remove_leftovers(run)
                for number in range(epoch + 1, epoch + 10_000):
                    save(run, number)

        draw = random.Random(0)
        with run_folder.claim(folder) as run:
            save(run, 1)
        epoch, longest = 1, 0.03
        for trial in range(150):
            child = forked(work)
            time.sleep(draw.uniform(0.001, longest))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            epoch = check(*range(epoch, epoch + 10_000))
            if epoch == 1:  # a machine so busy that no process has come to write yet
                longest *= 1.1
        assert epoch > 1
        with run_folder.claim(folder) as run:
            checkpoint.remove_leftovers(run)
        assert names() == {INDEX, f"checkpoint-{epoch}.safetensors"}, names()
        """,
    )


def test_a_reader_beside_a_writer_always_finds_a_checkpoint(tmp_path):
    by_a_writer(
        tmp_path,
        """
        def work():
            with run_folder.claim(folder) as run:
                for number in range(2, 200):
                    save(run, number)

        with run_folder.claim(folder) as run:
            save(run, 1)
        child = forked(work)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            check(*range(1, 200))
        assert check(199)
        """,
    )


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once(tmp_path, locks):
    """With locks one of them works; without, both do, and a checkpoint is there all the same."""
    by_a_writer(
        tmp_path,
        f"""
        if not {locks}:
            run_folder.fcntl = None

        def work():
            try:
                with run_folder.claim(folder) as run:
                    for number in range(2, 60):
                        save(run, number)
            except ValueError as error:
                assert "no other process writes into" in str(error), error
                os._exit(3)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(4)

        with run_folder.claim(folder) as run:
            save(run, 1)
        codes = []
        children = {{forked(work), forked(work), forked(work)}}
        while children:
            check(*range(1, 60))
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                children.remove(ended)
                codes.append(os.waitstatus_to_exitcode(status))
        assert codes.count(0) >= 1 and set(codes) <= ({{0, 3}} if {locks} else {{0}}), codes
        check(59)
        """,
    )


def test_a_dead_process_holds_no_lock(tmp_path):
    by_a_writer(
        tmp_path,
        """
        def work():
            with run_folder.claim(folder):
                (folder / "begun").touch()
                time.sleep(60)

        child = forked(work)
        while not (folder / "begun").exists():
            time.sleep(0.001)
        try:
            with run_folder.claim(folder):
                raise AssertionError
        except ValueError as error:
            assert f"where process {child} is at work" in str(error), error
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with run_folder.claim(folder):
            pass
        """,
    )
    assert names(tmp_path) == {"begun"}


def test_processes_append_one_after_another(tmp_path):
    """As the rows of benchmarks: whoever finds the file empty writes its header."""
    lines = by_a_writer(
        tmp_path,
        """
        def work():
            for _ in range(20):
                with open(folder / "rows.csv", "a") as file, run_folder.appending_alone(file):
                    if file.tell() == 0:
                        file.write("header\\n")
                    for _ in range(3):
                        file.write(f"{os.getpid()}\\n")
                        file.flush()

        children = [forked(work) for _ in range(4)]
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        print((folder / "rows.csv").read_text())
        """,
    ).split()
    assert lines[0] == "header" and lines.count("header") == 1 and len(lines) == 241
    assert all(len({*lines[at : at + 3]}) == 1 for at in range(1, 241, 3))
