"""What torchrun does, with ranks that are forked: they need not import torch anew.

    python torchrun_forked.py train --data digits --limit 64 --batch 8

This is torchrun's own launcher and agent, which starts all ranks anew when one has died; only the
reading of torchrun's options is left out. Rank 1 is killed in the second epoch of the first start.
"""

import os
import signal
import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from adatape_kernels.cli import main
from adatape_kernels.recipes.training.train_step import EagerSteps

STEP = 12  # of 8 that an epoch has


def rank(words):
    """Be a rank that runs the command; end as a program does."""
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        killed_at_a_step()
    sys.argv[1:] = words
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def killed_at_a_step():
    """Have this process killed before a step, so that the other rank waits for it."""
    compute, steps = EagerSteps.__call__, []

    def step(self, *given):
        steps.append(0)
        if len(steps) == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *given)

    EagerSteps.__call__ = step


if __name__ == "__main__":
    config = LaunchConfig(
        *(1, 1, 2),
        run_id="test",
        max_restarts=1,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    elastic_launch(config, rank)(sys.argv[1:])
