"""The lock of a run's folder is that of one process, and of none that it forks."""

import os
import signal

from adatape_kernels.recipes.run_folder import LOCK, claim


def test_a_worker_that_outlives_a_killed_run_does_not_keep_it_from_going_on(tmp_path):
    """Workers that load images look only every few seconds whether training still runs."""
    told, tells = os.pipe()
    run = os.fork()
    if not run:
        with claim(tmp_path):
            worker = os.fork()
            if not worker:
                signal.alarm(60)
                signal.pause()
            os.write(tells, f"{worker}\n".encode())
            signal.pause()
        os._exit(0)
    worker = int(os.read(told, 20))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        assert (tmp_path / LOCK).exists()
        with claim(tmp_path) as again:
            again.write("a.csv", b"1")
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(told)
        os.close(tells)


def test_a_process_that_was_forked_leaves_the_lock_to_the_one_before(tmp_path):
    with claim(tmp_path):
        child = os.fork()
        if not child:
            try:
                with claim(tmp_path):
                    os._exit(0)
            except ValueError as error:
                os._exit(3 if f"process {os.getppid()} is at work" in str(error) else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert not (tmp_path / LOCK).exists()
