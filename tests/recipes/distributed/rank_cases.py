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
from pathlib import Path

import torch
import torch._dynamo  # which DistributedDataParallel imports, once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp
from rank_models import CPU, DATA, IMAGES, LABELS, MODELS, NORMALISE, PLAN, new_model, noisy
from rank_runs import CHAINS, deal_runs, epoch_of_run, share_commands

from adatape_kernels.data.loading import BatchLoader, BatchMaker, UnreadableImages
from adatape_kernels.recipes.distributed.dealing import Dealer
from adatape_kernels.recipes.distributed.divided_parameters import is_part, whole
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.rank_watch import RankWatch
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.run_folder import write_file
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train
from adatape_kernels.recipes.training.train_step import add_gradients

BATCHES = (7, 2)
"""Sizes of batches; the second has fewer images than three ranks."""
STEPS = [(kind, BATCHES[0], 1) for kind in MODELS] + [("adatape", 7, 3)]
STEPS += [(kind, BATCHES[1], 1) for kind in ("adatape", "uvit")]
EPOCHS = ("drawn", "loaded", "skipping")
"""What prepares the batches; "skipping" leaves an image out that cannot be read."""
DIVIDED_EPOCHS = {2: "drawn", 3: "skipping"}
"""Which of EPOCHS are trained with parameters that are divided, too, by the number of ranks."""
UNREADABLE = 11


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
        kind = DIVIDED_EPOCHS[ranks.count]
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
    codes = {"deal_runs": in_ranks(3, folder, deal_runs, "deal_runs")}
    for count in (1, 2):
        codes[f"commands of {count}"] = in_ranks(count, folder, share_commands)
    for chain, steps in CHAINS.items():
        (folder / chain).mkdir()
        for count, parallel in steps:
            work = functools.partial(epoch_of_run, parallel=parallel)
            name = folder / ("killed" if parallel == "killed" else "chain")
            codes.setdefault(chain, []).append(in_ranks(count, folder / chain, work, name))
    RankWatch.__init__.__defaults__ = 0.1, 0.5  # seconds between two beats, and of patience
    for work in FAULTS:
        codes[work.__name__] = in_ranks(3, folder, work, work.__name__)
    torch.save(codes, folder / "codes")


FAULTS = (wait_for_the_dead, fail, hang)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
