"""The choice of how much is trained, by steps of each model and size that are timed first."""

import time

from adatape_kernels.recipes.compare.compare_measuring import first_batch, seconds_by_image
from adatape_kernels.recipes.compare.compare_plan import ComparePlan, Costs, RunCost, planned
from adatape_kernels.recipes.compare.compare_progress import COUNT_FORM
from adatape_kernels.recipes.compare.compare_training import StepTime, TimingTask, new_model
from adatape_kernels.recipes.compare.compare_work import CompareWork
from adatape_kernels.recipes.table_bars import TableBars

# Share of the budget, and seconds for a model and a size, in which training steps are timed.
_TIMING_SHARE, _LEAST_TIMING, _MOST_TIMING = 0.03, 0.2, 3.0


def calibrated(work: CompareWork, started: float) -> tuple[ComparePlan, Costs]:
    """Time some steps of each model and size, and choose how much is trained.

    Args:
        work: what is compared.
        started: when the budget began, by `time.monotonic`.

    Raises:
        ValueError: the budget is too small.
        RuntimeError: a process was ended.
    """
    c, data = work.config, work.data
    pairs = {(run.model, run.size): run for run in work.runs}
    seconds = _LEAST_TIMING
    if c.budget is not None:
        share = _TIMING_SHARE * c.budget * work.jobs / len(pairs)
        seconds = min(_MOST_TIMING, max(_LEAST_TIMING, share))
    tasks = [
        (run.stem, TimingTask(work.task(run, 1, c.limit), seconds))
        for run in sorted(pairs.values(), key=lambda run: -run.size)
    ]
    train: dict[tuple[str, int], float] = {}
    with TableBars(len(pairs), title="timing training steps", form=COUNT_FORM) as bars:
        for message in work.done(tasks):
            assert isinstance(message, StepTime)
            train[message.run.model, message.run.size] = message.seconds
            bars.advance()
    begun = time.monotonic()
    images = first_batch(data, work.normalise)
    loading = (time.monotonic() - begun) / len(images)
    costs = {}
    for key, run in pairs.items():
        model = new_model(c.train_config(run, 1, c.limit), data, work.normalise)
        costs[key] = RunCost(train[key], seconds_by_image(model.to(work.device), images))
    plan = planned(
        c,
        costs,
        images=len(data.train_labels),
        test_images=len(data.test_labels),
        jobs=work.jobs,
        loading=loading,
        spent=time.monotonic() - started,
    )
    return plan, costs
