"""Runs the tester, `python -m fuzz --seconds 60`, or one case again, `… --case '{…}'`."""

import argparse
import json
import os
import secrets
import sys

from fuzz.preparation import prepare


def main(argv=None):
    """Return the exit code: 0 no fault, 1 a fault."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", help="a number; default: a new one, which is printed")
    parser.add_argument("--backends", help="lanes, with commas between; default: all that are here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--case", help="a case as JSON: run it alone")
    given = parser.parse_args(argv)
    prepare()
    from fuzz import lanes, one_case, supervisor

    if given.case:
        found = one_case.isolated_outcome(json.loads(given.case))
        print(
            f"FAULT {found['fault']}: {found['text']}" if "fault" in found else f"no fault: {found}"
        )
        return 1 if "fault" in found else 0
    names = given.backends.split(",") if given.backends else lanes.available()
    unknown = set(names) - set(lanes.available())
    if unknown:
        print(f"backends: expected some of {', '.join(lanes.available())}, got {given.backends}")
        return 2
    seed = int(given.seed) if given.seed else secrets.randbelow(1 << 31)
    print(f"seed {seed}, lanes {', '.join(names)}, {given.seconds:.0f} s", flush=True)
    run = supervisor.Supervisor(names, seed, given.workers, lambda line: print(line, flush=True))
    faults = run.run(given.seconds)
    print("\n".join(run.tally.lines(seed)))
    print(f"{faults} different faults" if faults else "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
