"""Steps, epochs and evaluations in 1, 2 and 3 processes; run as a program by the tests.

    python rank_cases.py FOLDER

The program imports torch once and forks the ranks, which talk by gloo as under torchrun. Each rank
writes what it found into FOLDER, and the tests compare.
"""

import functools
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # which DistributedDataParallel imports, once for all ranks
import torch.distributed as dist
from torch import nn

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    UViT,
    UViTConfig,
)
from adatape_kernels.recipes.averaged_model import averaged_model
from adatape_kernels.recipes.distributed.dealing import Dealer
from adatape_kernels.recipes.distributed.ranks import started
from adatape_kernels.recipes.distributed.sharded_evaluation import evaluated
from adatape_kernels.recipes.execution import Execution
from adatape_kernels.recipes.train_loop import TrainPlan, train
from adatape_kernels.recipes.train_step import add_gradients

CPU = torch.device("cpu")
SIZES = {"num_classes": 5, "dim": 16, "num_heads": 2, "ffn_dim": 16, "image_size": 8}
SIZES |= {"in_channels": 1, "patch_size": 4}
TAPE = {"depth": 1, "tape_ffn_dim": 8, "num_tape_tokens": 4, "topk": 2, "bank_patch_size": 2}
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 1.2}),
    "no tape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "halt_threshold": 0.0}),
    "no ponder": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "ponder_weight": 0.0}),
    "uvit": (UViT, UViTConfig, {"depth": 4}),
    "avit": (AViT, AViTConfig, {"depth": 3, "gate_center": 4.0, "distribution_weight": 0.0}),
}
BATCHES = (7, 2)
"""Sizes of batches; the second has fewer images than three ranks."""
STEPS = [(kind, images, 1) for kind in MODELS for images in BATCHES] + [("adatape", 7, 3)]
IMAGES = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(30) % 5
DATA = ImageSet(IMAGES[:17], LABELS[:17], IMAGES[17:], LABELS[17:], tuple("abcde"))
PLAN = TrainPlan(2, 6, 0.1, max_grad_norm=0.5, mixup=0.4, loss="sigmoid")


def new_model(kind):
    made, config, options = MODELS[kind]
    torch.manual_seed(0)
    model = made(config(**SIZES, **options))
    nn.init.normal_(model.head.weight, std=0.1)  # a new head would send no gradient on
    return model.train()


def step(ranks, kind, images, parts):
    """The gradients of a step by name, and its loss, in float64."""
    model = new_model(kind).double()
    execution = Execution(accumulate=parts, ranks=ranks)
    with execution.forward_of(model) as forward:
        dealer = Dealer(forward, ranks, 10)
        dealer.rows = torch.tensor([9, 1, 0, 5, 5, 7, 1, 1, 1, 1])[: len(dealer.rows)]
        share = dealer.share(torch.arange(images))
        given = IMAGES[:images].double(), LABELS[:images]
        sums = add_gradients(forward, model.loss, *given, CPU, execution, share)
        together = ranks.summed(torch.stack(sums[:3]).double())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "sums": together}


def epochs(ranks):
    """The parameters and their average after two epochs, and what each epoch said."""
    model = new_model("adatape")
    averaged, results = averaged_model(model, 0.9), []

    def told(result):
        test = evaluated(model, DATA, Normaliser((0.5,), (0.3,)), ranks=ranks)
        results.append((result, test))
        return "an epoch"

    # AdamW would make steps of full length of the rounding of gradients that are 0, a key's bias's.
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    execution = Execution(ranks=ranks)
    noisy = functools.partial(torch.add, alpha=0.1)
    train(
        *(model, DATA, PLAN, Normaliser((0.5,), (0.3,))),
        lambda images, generator: noisy(images, torch.rand(images.shape, generator=generator)),
        **{"averaged": averaged, "after_epoch": told, "execution": execution},
        optimizer=optimizer,
    )
    numbers = [[r.loss, r.accuracy, r.learning_rate, *test] for r, test in results]
    found = {name: p.detach() for name, p in model.named_parameters()}
    found |= {f"average.{name}": p.detach() for name, p in averaged.module.named_parameters()}
    shares = [None if r.imbalance is None else r.imbalance.metrics() for r, _ in results]
    return {**found, "numbers": torch.tensor(numbers).double()}, shares


def found_by(ranks):
    torch.set_num_threads(1)
    found = {
        f"{kind}-{images}-{parts}": step(ranks, kind, images, parts)
        for kind, images, parts in STEPS
    }
    found["epochs"], shares = epochs(ranks)
    return {**found, "shares": shares}


def serve(rank, count, folder, port):
    """Be one of the ranks, and write what it found."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with started(CPU) as ranks:
        torch.save(found_by(ranks), folder / f"{count}-{rank}.pt")


def main(folder):
    for count in (3, 2, 1):
        store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        children = []
        for rank in range(count):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    serve(rank, count, folder, store.port)
                    code = 0
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert codes == count * [0], codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
