"""The lanes: what makes cases and what runs them, by name."""

import random

from adatape_kernels.ops.op import BACKENDS, why_absent
from fuzz import file_lane, halting_cases, layout_lane, model_cases, op_cases, op_lane

AREAS = {
    "ops": op_lane.run_case,
    "models": model_cases.run_case,
    "halting": halting_cases.run_case,
    "layouts": layout_lane.run_case,
    "files": file_lane.run_case,
}
"""What runs a case, by its area."""
OTHERS = {
    "models": model_cases.random_case,
    "halting": halting_cases.random_case,
    "layouts": layout_lane.random_case,
    "files": file_lane.random_case,
}
"""What makes a case from a random generator, by lane, beside the backends."""
SHARES = {
    "eager": 1, "cpp": 3, "triton": 2, "cuda": 2, "models": 1, "halting": 1, "layouts": 0.3,
    "files": 1.5,
}  # fmt: skip
"""How the time is divided among lanes."""


def available():
    """Return the names of the lanes that can run here."""
    return [*(name for name in BACKENDS if why_absent(name) is None), *OTHERS]


def make_case(lane, seed, number):
    """Return case `number` of a lane, which depends on these three alone."""
    rng = random.Random(f"{seed} {lane} {number}")
    return op_cases.random_case(rng, lane) if lane in BACKENDS else OTHERS[lane](rng)


def run_case(case):
    """Run a case; return what ran. Raises Fault."""
    return AREAS[case["area"]](case)
