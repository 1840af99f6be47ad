"""Steps, epochs and evaluations in 1, 2 and 3 processes; run as a program by the tests.

    python rank_cases.py FOLDER

The program imports torch once and forks the ranks, which talk by gloo as under torchrun. Each rank
writes what it found into FOLDER, and the tests compare.
"""

import contextlib
import functools
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which DistributedDataParallel imports, once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.loading import BatchLoader, BatchMaker, UnreadableImages
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    UViT,
    UViTConfig,
)
from adatape_kernels.recipes import checkpoint, demo, finetune
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.distributed import divided_checkpoint
from adatape_kernels.recipes.distributed.dealing import Dealer, rows_tensors, saved_rows
from adatape_kernels.recipes.distributed.divided_checkpoint import save_together
from adatape_kernels.recipes.distributed.divided_parameters import is_part, whole, whole_model
from adatape_kernels.recipes.distributed.rank_workers import runs_at_a_time, runs_dealt_out
from adatape_kernels.recipes.distributed.rank_watch import RankWatch
from adatape_kernels.recipes.distributed.ranks import started
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.run_folder import claim, write_file
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.train_step import add_gradients
from adatape_kernels.recipes.worker_processes import in_processes

CPU = torch.device("cpu")
SIZES = {"num_classes": 5, "dim": 16, "num_heads": 2, "ffn_dim": 16, "image_size": 8}
SIZES |= {"in_channels": 1, "patch_size": 4}
TAPE = {"depth": 1, "tape_ffn_dim": 8, "num_tape_tokens": 4, "topk": 2, "bank_patch_size": 2}
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 1.2}),
    "no tape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 0.0}),
    "uvit": (UViT, UViTConfig, {"depth": 4}),
    "avit": (AViT, AViTConfig, {"depth": 3, "gate_center": 4.0, "distribution_weight": 0.0}),
}
BATCHES = (7, 2)
"""Sizes of batches; the second has fewer images than three ranks."""
STEPS = [(kind, BATCHES[0], 1) for kind in MODELS] + [("adatape", 7, 3)]
STEPS += [(kind, BATCHES[1], 1) for kind in ("adatape", "uvit")]
IMAGES = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(30) % 5
DATA = ImageSet(IMAGES[:17], LABELS[:17], IMAGES[17:], LABELS[17:], tuple("abcde"))
NORMALISE = Normaliser((0.5,), (0.3,))
EPOCHS = ("drawn", "loaded", "skipping")
"""What prepares the batches; "skipping" leaves an image out that cannot be read."""
DIVIDED_EPOCHS = ("drawn", "skipping")
"""Those of EPOCHS that are trained with parameters that are divided, too."""
UNREADABLE = 11
CHAINS = {
    "unbroken": [(1, "ddp"), (1, "ddp")],
    "fsdp and ddp": [(2, "fsdp"), (2, "ddp")],
    "ddp and fsdp": [(2, "ddp"), (2, "fsdp")],
    "fsdp and one process": [(2, "fsdp"), (1, "fsdp")],
    "fsdp, killed": [(3, "fsdp"), (3, "killed"), (2, "fsdp")],
}
"""Runs of two epochs, by the ranks that compute each; "killed" while they write their parts."""
PLAN = TrainPlan(2, 6, 0.1, max_grad_norm=0.5, mixup=0.4, loss="sigmoid")


def new_model(kind):
    made, config, options = MODELS[kind]
    torch.manual_seed(0)
    model = made(config(**SIZES, **options))
    nn.init.normal_(model.head.weight, std=0.1)  # a new head would send no gradient on
    return model.train()


def step(ranks, kind, images, parts, parallel="ddp", **options):
    """The gradients of a step by name, and its loss, in float64."""
    model = new_model(kind).double()
    execution = Execution(accumulate=parts, parallel=parallel, ranks=ranks, **options)
    with execution.forward_of(model) as forward:
        dealer = Dealer(forward, ranks, 10)
        dealer.rows = torch.tensor([9, 1, 0, 5, 5, 7, 1, 1, 1, 1])[: len(dealer.rows)]
        share = dealer.share(torch.arange(images))
        given = IMAGES[:images].double(), LABELS[:images]
        if share is not None:
            given = tuple(map(share.taken, given))
        sums = add_gradients(forward, model.loss, *given, CPU, execution, share)
        together = ranks.summed(torch.stack(sums[:3]).double())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if parallel == "fsdp":
        assert all(map(is_part, found.values()))
    return {**{name: whole(grad) for name, grad in found.items()}, "sums": together}


class Damaged:
    """Images of which one cannot be read."""

    def __len__(self):
        return len(DATA.train_images)

    def __getitem__(self, indices):
        if (indices == UNREADABLE).any():
            raise ValueError("a.jpg: expected a whole image")
        return DATA.train_images[indices]


def noisy(images, generator):
    return images + 0.1 * torch.rand(images.shape, generator=generator)


def loader_of(kind):
    """What prepares the batches: nothing, or a loader of images one of which may be damaged."""
    if kind == "drawn":
        return None
    damaged = kind == "skipping"
    unreadable = UnreadableImages(1)
    maker = BatchMaker(
        Damaged() if damaged else DATA.train_images,
        DATA.train_labels,
        num_classes=5,
        batch=PLAN.batch,
        batches=PLAN.steps_per_epoch(len(DATA.train_labels)),
        seed=PLAN.seed,
        normalise=NORMALISE,
        make_augment=lambda: noisy,
        mixup=PLAN.mixup,
        skip=damaged,
    )
    return BatchLoader(maker, 1 if kind == "loaded" else 0, unreadable=unreadable)


def epochs(ranks, kind, parallel="ddp"):
    """The parameters and their average after two epochs, and what each epoch said."""
    model = new_model("adatape")
    averaged, results = averaged_model(model, 0.9), []

    def told(result):
        test = evaluated(model, DATA, NORMALISE, ranks=ranks)
        results.append((result, test))
        return "an epoch"

    # AdamW would make steps of full length of the rounding of gradients that are 0, a key's bias's.
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    loader = loader_of(kind)
    with contextlib.nullcontext() if loader is None else loader:
        train(
            *(model, DATA, PLAN, NORMALISE, noisy),
            **{
                "averaged": averaged,
                "after_epoch": told,
                "execution": Execution(parallel=parallel, ranks=ranks),
            },
            **{"optimizer": optimizer, "loader": loader},
        )
    numbers = [[r.loss, r.accuracy, r.learning_rate, *test] for r, test in results]
    found = {name: whole(p.detach()) for name, p in model.named_parameters()}
    average = averaged.module.named_parameters()
    found |= {f"average.{name}": whole(p.detach()) for name, p in average}
    shares = [None if r.imbalance is None else r.imbalance.metrics() for r, _ in results]
    return {**found, "numbers": torch.tensor(numbers).double()}, shares


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


def found_by(ranks):
    torch.set_num_threads(1)
    found = {
        f"{kind}-{images}-{parts}": step(ranks, kind, images, parts)
        for kind, images, parts in STEPS
    }
    for kind in EPOCHS:
        found[kind], shares = epochs(ranks, kind)
    if ranks.several:
        for kind, images, parts in STEPS:
            found[f"fsdp-{kind}-{images}-{parts}"] = step(ranks, kind, images, parts, "fsdp")
        twice = step(ranks, "adatape", BATCHES[0], 1, "fsdp", checkpoint_layers=True)
        found["fsdp, layers twice"] = twice
        for kind in DIVIDED_EPOCHS:
            found[f"fsdp-{kind}"], _ = epochs(ranks, kind, "fsdp")
    return {**found, "shares": shares}


def save_found(ranks, folder):
    """Write what a rank found."""
    torch.save(found_by(ranks), folder / f"{ranks.count}-{ranks.number}.pt")


def wait_for_the_dead(ranks, folder):
    """Be killed as rank 1, in the middle of steps; otherwise write files until that is felt."""
    for step in range(1000):
        if ranks.leads:
            write_file(folder / "written", step * b"whole")
        if step == 3 and ranks.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.summed(torch.ones(3))


def fail(ranks, folder):
    """Fail as rank 2, while the others wait for it."""
    if ranks.number == 2:
        raise ValueError("photos/a.jpg: expected an image, got another file")
    ranks.summed(torch.ones(3))


def hang(ranks, folder):
    """Stop as rank 1, so that no connection closes and the watch alone can tell."""
    if ranks.number == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.summed(torch.ones(3))


def deal_runs(ranks, folder):
    """Let ranks 1 and 2 work on runs that rank 0 deals out, of which the last one fails."""
    with runs_dealt_out(CPU) as works:
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

    finetune.train.run, finetune.train.finished = run, lambda out, *of: out.name == "tape-1"
    finetune.FinetunePlan.check_data = lambda plan: None
    finetune._write_source = lambda own, made: own.write(finetune.SOURCE, b"a source")
    finetune._report = lambda own, plan, *rest: plan.seeds
    seeds = finetune.run(folder / f"finetune of {ranks.count}", {"data": "digits"}, seeds=2)
    found = {"weights": weights, "calls": calls, "seeds": seeds}
    torch.save(found, folder / f"commands-{ranks.count}-{ranks.number}")


def serve(rank, count, folder, port, work):
    """Be one of the ranks, which does some work."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with started(CPU) as ranks:
        work(ranks, folder)


def in_ranks(count, folder, work, name=None):
    """The exit codes of ranks that each do some work; their last words go into files."""
    store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    children = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            if name is not None:
                words = os.open(folder / f"{name}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
                os.dup2(words, 2)
            try:
                serve(rank, count, folder, store.port, work)
            except Exception as error:
                say(f"adatape-kernels: {error}")
                os._exit(2)
            except SystemExit as stop:
                os._exit(stop.code)
            sys.stderr.flush()
            os._exit(0)
        children.append(pid)
    codes = {}
    while len(codes) < count:
        pid, status = os.wait()
        codes[children.index(pid)] = os.waitstatus_to_exitcode(status)
        if work is hang and codes.keys() == {0, 2}:  # as torchrun does, when it gives up
            os.kill(children[1], signal.SIGKILL)
    return [codes[rank] for rank in range(count)]


def main(folder):
    torch.set_num_threads(1)
    for count in (3, 2, 1):
        assert in_ranks(count, folder, save_found) == count * [0]
    RankWatch.__init__.__defaults__ = 0.1, 0.5  # seconds between two beats, and of patience
    codes = {work.__name__: in_ranks(3, folder, work, work.__name__) for work in FAULTS}
    codes["deal_runs"] = in_ranks(3, folder, deal_runs, "deal_runs")
    for count in (1, 2):
        codes[f"commands of {count}"] = in_ranks(count, folder, share_commands)
    for chain, steps in CHAINS.items():
        (folder / chain).mkdir()
        for count, parallel in steps:
            work = functools.partial(epoch_of_run, parallel=parallel)
            name = None if parallel != "killed" else parallel
            codes.setdefault(chain, []).append(in_ranks(count, folder / chain, work, name))
    torch.save(codes, folder / "codes")


FAULTS = (wait_for_the_dead, fail, hang)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
