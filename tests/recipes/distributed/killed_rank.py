"""The command, of which rank 1 is killed in the second epoch when torchrun has first started it.

torchrun --nproc-per-node 2 killed_rank.py train --data digits --limit 64 --batch 8
"""

import os
import signal
import sys

from adatape_kernels.cli import main
from adatape_kernels.recipes.training.train_step import EagerSteps

STEP = 12  # of 8 that an epoch has


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
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        killed_at_a_step()
    sys.exit(main())
