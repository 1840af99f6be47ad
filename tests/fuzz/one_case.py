"""Runs one case and says how it ended: in this process, or in one of its own."""

import json
import os
import tempfile
import time

from fuzz import lanes
from fuzz.isolation import GROWTH, Child, peak_bytes
from fuzz.verdict import Fault

TIMEOUTS = {"triton": 120, "cuda": 60}
TIMEOUT = 30
"""Seconds that a case may take, by its lane where it is slow."""


def timeout_of(lane):
    longer = 4 if "ADATAPE_SANITIZER" in os.environ else 1
    return longer * TIMEOUTS.get(lane, TIMEOUT)


def lane_of(case):
    return case.get("backend", case["area"])


def outcome(case):
    """Run a case here; return what ran, or {"fault": kind, "text": …}."""
    before = peak_bytes()
    try:
        done = lanes.run_case(case)
    except Fault as fault:
        # The most memory that a process ever held does not shrink: the next case needs another.
        return {"fault": fault.kind, "text": fault.text, "spoilt": fault.kind == "memory"}
    except Exception as error:
        return {"fault": f"raised {type(error).__name__}", "text": _where(error)}
    grown = peak_bytes() - before
    if grown > GROWTH and "ADATAPE_SANITIZER" not in os.environ:
        return {"fault": "memory", "text": f"took {grown >> 20} MiB", "spoilt": True}
    return done


def _where(error):
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} ({' < '.join(reversed(frames[-4:]))})"[:1000]


def isolated_outcome(case):
    """Run a case in a process of its own; a crash, a hang and a memory hog are outcomes too."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        child = Child(lambda say: say(outcome(case)), log.name)
        deadline = time.monotonic() + timeout_of(lane_of(case))
        said = []
        while child.ended is None and not said:
            said = child.hear(0.2)
            if time.monotonic() > deadline:
                child.kill()
                return {"fault": "hang", "text": f"no end in {timeout_of(lane_of(case))} s"}
        if said:
            child.kill()
            return said[0]
        return {"fault": child.ended, "text": child.last_words()}


def command(case):
    """Return the command that repeats a case."""
    return f"make fuzz CASE='{json.dumps(case)}'"
