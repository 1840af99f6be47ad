"""Whole commands in several processes that meet with faults; run as a program by the tests.

    python rank_commands.py FOLDER

The program imports torch once and forks the ranks, as `rank_cases` does. What a command prints goes
into files of FOLDER, and its exit codes into FOLDER/codes.
"""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import torch
import torch._dynamo  # which DistributedDataParallel imports, once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp

from adatape_kernels.cli import main
from adatape_kernels.recipes import worker_processes
from adatape_kernels.recipes.distributed import joining
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.train_step import EagerSteps

SIZES = ["--dim", 16, "--depth", 1, "--heads", 2, "--ffn", 16]
# The last batch of 22 images is one image, so that two of three ranks have none.
RUN = ["train", "--data", "digits", "--limit", 22, "--batch", 7, "--epochs", 2, *SIZES]
ALL = ["--accumulate", 3, "--ema", 0.9, "--mixup", 0.2, "--checkpoint-layers"]
ALL += ["--halt-threshold-range", "0.3,1.5", "--halt-threshold", 1.0]
BF16 = ["--dtype", "bf16", "--num-tape-tokens", 3]
TABLE = ["parity", "--lengths", 4, "--models", "adatape,transformer", "--seeds", 0]
TABLE += ["--steps", 3, "--batch", 8, "--eval-examples", 50]
# What is wrong is seen by the parser, before the ranks meet, and when they have met.
REFUSED = {
    "no number": [*RUN, "--epochs", "two"],
    "no device": [*RUN, "--device", "tpu"],
    "no heads": [*RUN, "--heads", 3],
    "unused": [*RUN, "--num-tape-tokens", 0, "--topk", 3],
}
STEPS = 4  # of an epoch
_SMALL_FILE = 2000  # bytes, which a part of a checkpoint has more of


def at_step(number, do):
    """Do something before the step of this number that the process computes."""
    compute, steps = EagerSteps.__call__, []

    def step(self, *given):
        steps.append(0)
        if len(steps) == number:
            do()
        return compute(self, *given)

    EagerSteps.__call__ = step


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def on_a_full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL_FILE, resource.RLIM_INFINITY))


def interrupted_again_and_again():
    """Have interrupts sent to this process, as a terminal and torchrun do together."""
    rank = os.getpid()
    if not os.fork():
        with contextlib.suppress(ProcessLookupError):
            for _ in range(200):
                os.kill(rank, signal.SIGINT)
                os.kill(rank, signal.SIGTERM)
                time.sleep(0.01)
        os._exit(0)


def later(fault, rank):
    """Let a fault befall rank 1 in the second epoch."""
    if rank == 1:
        at_step(STEPS + 2, fault)


def asked_to_end(rank):
    """Have each rank asked to end, in the second epoch and again, as torchrun does by SIGTERM."""
    at_step(STEPS + 2 + rank, interrupted_again_and_again)


def asked_to_end_too_soon(rank):
    """Have rank 0 asked to end while it waits for rank 1, which has not come yet."""
    waits = joining._wait_for_all

    def waits_in_vain(*given):
        Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        waits(*given)

    if rank == 0:
        joining._wait_for_all = waits_in_vain
    else:
        time.sleep(2)


def with_forked_workers(rank):
    """Fork the processes that train a rank's runs, which would otherwise import torch anew."""
    forks = multiprocessing.get_context("fork")
    worker_processes.multiprocessing.get_context = lambda method: forks


def in_ranks(folder, name, arguments, count=1, restarts=0, store=None, before=None):
    """The exit codes of a command in so many processes, which write what they say into files.

    Args:
        folder: where these files are.
        name: begins their names; the rank ends them.
        arguments: the command; a function of the rank where it is not the same for all.
        count: number of ranks.
        restarts: how often torchrun has started them anew.
        store: what torchrun keeps while it does; a new one by default.
        before: called with the rank.
    """
    if store is None:
        store = new_store()
    children = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            words = os.open(folder / f"{name}-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(words, 1)
            os.dup2(words, 2)
            torchrun = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}
            torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
            torchrun |= {"TORCHELASTIC_RESTART_COUNT": restarts}
            os.environ |= {key: str(value) for key, value in torchrun.items()}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            # Who runs the tests in the background has interrupts ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before is not None:
                before(rank)
            try:
                asked = arguments(rank) if callable(arguments) else arguments
                code = main([*map(str, asked)])
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return [*map(os.waitstatus_to_exitcode, statuses)]


def new_store():
    return dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)


def run_all(folder):
    """The exit codes of all commands by their names."""
    call = functools.partial(in_ranks, folder)
    fsdp = ["--parallel", "fsdp"]
    codes = {
        "one": call("one", [*RUN, *ALL, "--out", folder / "one"]),
        "one bf16": call("one bf16", [*RUN, *BF16, "--out", folder / "one bf16"]),
        "bf16": call("bf16", [*RUN, *BF16, *fsdp, "--out", folder / "bf16"], 2),
    }
    codes["two of fsdp"] = call("two of fsdp", [*RUN, *ALL, *fsdp, "--out", folder / "two"], 2)
    for name, count, fault, options in (
        ("killed", 3, killed, []),
        ("killed of fsdp", 2, killed, fsdp),
        ("full disk", 2, on_a_full_disk, fsdp),
    ):
        command, store = [*RUN, *ALL, *options, "--out", folder / name], new_store()
        before = functools.partial(later, fault)
        codes[name] = call(name, command, count, store=store, before=before)
        (folder / f"{name}.json").write_bytes((folder / name / "checkpoint.json").read_bytes())
        again = f"{name}, again"
        codes[again] = call(again, command, count, restarts=1, store=store)
    befallen = functools.partial(later, interrupted_again_and_again)
    codes["interrupted"] = call(
        "interrupted", [*RUN, "--out", folder / "interrupted"], 2, before=befallen
    )
    codes["all interrupted"] = call(
        "all interrupted", [*RUN, "--out", folder / "all"], 2, before=asked_to_end
    )
    codes["too soon"] = call(
        "too soon", [*RUN, "--out", folder / "new"], 2, before=asked_to_end_too_soon
    )
    for name, words in REFUSED.items():
        codes[name] = call(name, [*words, "--out", folder / "new"], 2)
    codes["refused by one"] = call(
        "refused by one",
        lambda rank: [*RUN, "--epochs", "two" * rank or 2, "--out", folder / "new"],
        2,
    )
    codes["help"] = call("help", ["train", "--help"], 2)
    codes["other seeds"] = call(
        "other seeds", lambda rank: ["demo", "--seed", rank, "--out", folder / "new"], 2
    )
    codes["other tables"] = call(
        "other tables", lambda rank: [*TABLE, "--steps", 3 + rank, "--out", folder / "new"], 2
    )
    codes["other kinds"] = call(
        "other kinds",
        lambda rank: ["finetune", *RUN[1:], "--seeds", 1 + rank, "--out", folder / "new"],
        2,
    )
    codes["table of one"] = call(
        "table of one",
        [*TABLE, "--jobs", 1, "--out", folder / "table of one"],
        before=with_forked_workers,
    )
    shared = [*TABLE, "--out", folder / "table"]
    codes["table"] = call("table", shared, 2, before=with_forked_workers)
    (folder / "table" / "transformer-4-0.json").unlink()
    made = (folder / "table" / "adatape-4-0.json").read_bytes()
    codes["table, again"] = call("table, again", shared, 2, before=with_forked_workers)
    assert (folder / "table" / "adatape-4-0.json").read_bytes() == made
    codes["other sizes"] = call(
        "other sizes", lambda rank: [*RUN, "--dim", 16 + 16 * rank, "--out", folder / "new"], 2
    )
    (folder / "own-1").mkdir()
    codes["other folders"] = call(
        "other folders", lambda rank: [*RUN, *fsdp, "--out", folder / f"own-{rank}"], 2
    )
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.write_report = lambda *given, **named: None  # one process alone writes it
    # Those that train for a table are forked, too: each would import all of this anew.
    forking = multiprocessing.get_context("fork")
    worker_processes.multiprocessing = SimpleNamespace(get_context=lambda start: forking)
    found = run_all(Path(sys.argv[1]))
    torch.save(found, Path(sys.argv[1]) / "codes")
