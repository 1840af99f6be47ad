"""Whole commands in several processes that meet with faults; run as a program by the tests.

    python rank_commands.py FOLDER

The program imports torch once and forks the ranks, as `rank_cases` does. What a command prints goes
into files of FOLDER, and its exit codes into FOLDER/codes.
"""

import contextlib
import functools
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # which DistributedDataParallel imports, once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp

from adatape_kernels.cli import main
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.train_step import EagerSteps

SIZES = ["--dim", 16, "--depth", 1, "--heads", 2, "--ffn", 16]
# The last batch of 22 images is one image, so that two of three ranks have none.
RUN = ["train", "--data", "digits", "--limit", 22, "--batch", 7, "--epochs", 2, *SIZES]
ALL = ["--accumulate", 3, "--ema", 0.9, "--mixup", 0.2, "--checkpoint-layers"]
ALL += ["--halt-threshold-range", "0.3,1.5", "--halt-threshold", 1.0]
BF16 = ["--dtype", "bf16", "--num-tape-tokens", 3]
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
    for name, count, fault, options in (
        ("killed", 3, killed, []),
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
    found = run_all(Path(sys.argv[1]))
    torch.save(found, Path(sys.argv[1]) / "codes")
