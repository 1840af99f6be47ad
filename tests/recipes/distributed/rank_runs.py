"""Whole runs and commands of several ranks, which go on, are killed, or are dealt out."""

import contextlib
import os
import signal
import time
from dataclasses import replace

import torch
from rank_models import CPU, DATA, NORMALISE, PLAN, new_model, noisy

from adatape_kernels.recipes import checkpoint, demo
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.distributed import divided_checkpoint
from adatape_kernels.recipes.distributed.dealing import rows_tensors, saved_rows
from adatape_kernels.recipes.distributed.divided_checkpoint import save_together
from adatape_kernels.recipes.distributed.divided_parameters import is_part, whole_model
from adatape_kernels.recipes.distributed.rank_workers import runs_at_a_time, runs_dealt_out
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.finetune import finetune
from adatape_kernels.recipes.run_folder import claim, write_file
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.worker_processes import in_processes

CHAINS = {
    "unbroken": [(1, "ddp"), (1, "ddp")],
    "ddp and fsdp": [(2, "ddp"), (2, "fsdp")],
    "fsdp and one process": [(2, "fsdp"), (1, "fsdp")],
    "fsdp, killed": [(2, "fsdp"), (2, "killed"), (3, "fsdp")],
}
"""Runs of two epochs, by the ranks that compute each; "killed" while they write their parts."""


class Enough(Exception):
    """An epoch is over."""


def epoch_of_run(ranks, folder, parallel):
    """Train for one epoch, from the checkpoint of a folder on, and write the next one."""
    torch.set_num_threads(1)
    model = new_model("adatape")
    averaged = averaged_model(model, 0.9)
    # Of a gradient that is rounding alone AdamW's own eps would make a step of full length.
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-3, fused=True)
    history, tensors = [], {}
    if (folder / checkpoint.INDEX).exists():
        saved = checkpoint.load(folder)
        checkpoint.restore(folder, saved.tensors, model, optimizer, averaged)
        history, tensors = saved.history, saved.tensors
    rows = saved_rows(folder, tensors, len(DATA.train_labels))
    with claim(folder) if ranks.leads else contextlib.nullcontext() as run:
        if run is not None:
            checkpoint.remove_leftovers(run)

        def told(result):
            test = evaluated(averaged.module, DATA, NORMALISE, ranks=ranks)
            after = [*history, [result.loss, result.accuracy, *test]]
            held = checkpoint.tensors_of(model, optimizer, averaged) | rows_tensors(rows)
            saved = Checkpoint(len(after), 3 * len(after), {}, {}, after, {}, held)
            if parallel == "killed" and ranks.number == 1:
                divided_checkpoint.write_file = write_and_die
            save_together(folder, run, saved, ranks)
            raise Enough

        execution = Execution(parallel="ddp" if parallel == "ddp" else "fsdp", ranks=ranks)
        with contextlib.suppress(Enough):
            train(
                *(model, DATA, PLAN, NORMALISE, noisy),
                **{"averaged": averaged, "after_epoch": told, "execution": execution},
                **{"optimizer": optimizer, "epochs_done": len(history), "rows": rows},
            )
    made = whole_model(averaged.module)
    assert made is averaged.module or not any(map(is_part, made.state_dict().values()))
    if ranks.leads:
        names = {file.name for file in folder.iterdir()}
        parts = ranks.count if ranks.several and execution.parallel == "fsdp" else 0
        assert len(names) == 2 + parts  # nothing is left over


def write_and_die(path, content, part):
    """Write a file, and be killed before anybody hears of it."""
    write_file(path, content, part)
    os.kill(os.getpid(), signal.SIGKILL)


def deal_runs(ranks, folder):
    """Let ranks 1 and 2 work on runs that rank 0 deals out, of which the last one fails."""
    with runs_dealt_out(CPU, {}) as works:
        if works:
            helpers = runs_at_a_time(None, CPU) - 1
            runs = [(f"run {number}", (number, folder)) for number in range(5)]
            found = [*in_processes(runs, train_a_run, helpers), *in_processes(runs[:1], told, 2)]
            torch.save(found, folder / "runs")
            list(in_processes([("run 5", (5, folder))], train_a_run, helpers))


def train_a_run(run, tell):
    """What a rank does with a run: it waits until the other rank has one, too."""
    number, folder = run
    if number == 5:
        raise ValueError("loss: expected a finite value, got nan")
    rank = int(os.environ["RANK"])
    (folder / f"busy-{rank}").touch()
    while len([*folder.glob("busy-*")]) < 2:
        time.sleep(0.01)
    return number, rank, torch.get_num_threads()


def told(run, tell):
    tell("half of it")
    return "all of it"


def share_commands(ranks, folder):
    """Run `demo` and `finetune` on all ranks, with a small set in the place of digits."""
    torch.set_num_threads(1)
    demo.digits = lambda seed: replace(DATA, class_names=tuple("abcdefghij"))
    demo.write_report = lambda out, model, *rest, **others: model.state_dict()
    weights = demo.run(folder / f"demo of {ranks.count}", epochs=1)
    calls = []

    def run(out, options, **others):
        calls.append((out.name, others["resume"]))
        if ranks.leads:  # what each rank would see otherwise
            out.mkdir()
            (out / checkpoint.INDEX).touch()

    finetune.train.run, finetune.train.finished = run, lambda out, *of: out.name == "input-1"
    finetune.FinetunePlan.check_data = lambda plan: None
    finetune._write_source = lambda own, made: own.write(finetune.SOURCE, b"a source")
    finetune._report = lambda own, plan, *rest: plan.seeds
    seeds = finetune.run(folder / f"finetune of {ranks.count}", {"data": "digits"}, seeds=2)
    found = {"weights": weights, "calls": calls, "seeds": seeds}
    torch.save(found, folder / f"commands-{ranks.count}-{ranks.number}")
