"""Halting that shrinks the batch: rules, the state of a loop, losses, and a report (SPEC 11, 12).

rule = Halting.act(threshold=0.99)
state = rule.start(batch)
for layer in layers:
    if state.done:
        break
    probabilities = halting_unit(state.batch)  # one for each example, or for each row
    state = rule.step(state, probabilities, layer(state.batch).data)
output, loss = state.output, task_loss + weight * ponder_loss(state)
"""

from adatape_kernels.halting.halting_losses import distribution_loss, ponder_loss
from adatape_kernels.halting.halting_report import HaltingReport, StepReport, report
from adatape_kernels.halting.rule import Halting
from adatape_kernels.halting.state import HaltingState

__all__ = [
    "Halting",
    "HaltingReport",
    "HaltingState",
    "StepReport",
    "distribution_loss",
    "ponder_loss",
    "report",
]
