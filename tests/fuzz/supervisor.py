"""Keeps workers at work for a while, notices how their cases end, and makes failing ones small."""

import json
import os
import tempfile
import time
from pathlib import Path

from fuzz import lanes
from fuzz.isolation import Child
from fuzz.minimiser import minimised
from fuzz.one_case import command, isolated_outcome, outcome, timeout_of
from fuzz.summary import Tally, label_of

RESIDENT = 3 << 30
"""Bytes that a worker may hold. A case that leads there is a fault; a slow growth ends a worker."""
SECONDS_TO_MINIMISE = 20
MOST_MINIMISED = 25


class Supervisor:
    """A run: its lanes with their shares of the time, its workers, and what they found."""

    def __init__(self, names, seed, workers, out=print):
        self.shares = {name: lanes.SHARES[name] for name in names}
        self.seed = seed
        self.out = out
        self.workers = workers
        self.tally = Tally()
        self.faults = {}
        self.smallest = {}
        self.minimise = SECONDS_TO_MINIMISE
        self.worth = lambda key: True
        self.enough = lambda: False

    def run(self, seconds):
        """Work for so many seconds; return the number of different faults."""
        self.started, self.seconds = time.monotonic(), seconds
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            self.folder = Path(folder)
            running = [_Worker(self, number) for number in range(self.workers)]
            while any(not worker.done for worker in running) and not self.enough():
                for worker in running:
                    worker.watch()
            for worker in running:
                worker.child.kill()
        self.tally.seconds = time.monotonic() - self.started
        return len(self.faults)

    def left(self):
        """Return the seconds that are left, without those that go into minimising."""
        return self.seconds - (time.monotonic() - self.started)

    def found(self, lane, number, found):
        """Report a fault the first time that a kind of case shows it."""
        case = lanes.make_case(lane, self.seed, number)
        broken = [f"({' '.join(each)})" for each in case.get("breakages", [])[:1]]
        key = lane, label_of(case), found["fault"], *broken
        self.faults[key] = self.faults.get(key, 0) + 1
        if self.faults[key] > 1:
            return
        self.out(f"FAULT {' '.join(key)}: {found['text']}")
        self.out(f"  case {number} of the lane {lane}, seed {self.seed}")
        began = time.monotonic()
        if self.worth(key) and len(self.smallest) < MOST_MINIMISED and self.left() > 0:
            case, runs = minimised(
                case, found["fault"], lambda c: isolated_outcome(c).get("fault"), self.minimise
            )
            self.smallest[key] = case
            text = isolated_outcome(case).get("text", "it does not repeat")
            self.out(f"  made smaller in {runs} runs: {text}")
        self.out(f"  repeat: {command(case)}")
        self.seconds += time.monotonic() - began


class _Worker:
    """A process that runs cases of all lanes in turn, and the next one where it ends early."""

    def __init__(self, run, number):
        self.run, self.number, self.done = run, number, False
        self.next = dict.fromkeys(run.shares, number)
        self.spent = dict.fromkeys(run.shares, 0.0)
        self._start()

    def _start(self):
        self.case, self.before = None, 0
        log = self.run.folder / f"worker-{self.number}.log"
        self.child = Child(self._work, log)

    def watch(self):
        """Take in what the process said, and see to it that it goes on."""
        if self.done:
            return
        for said in self.child.hear(0.05):
            self._take(said)
        if self.child.ended is not None:
            self._after_its_end()
        elif self.case and self.child.silent_for() > timeout_of(self.case[0]):
            self._fault("hang", f"no end in {timeout_of(self.case[0])} s")
        elif self.child.resident_bytes() > RESIDENT:
            grown = self.child.resident_bytes() - self.before
            if self.case and grown > RESIDENT // 3:
                self._fault("memory", f"held {grown >> 20} MiB more")
            else:
                self.run.tally.recycled += 1
                self._restart()

    def _take(self, said):
        if "begin" in said:
            lane, number, self.before = said["begin"]
            self.case = lane, number
            self.next[lane] = number + self.run.workers
            return
        lane, number = self.case
        self.case = None
        self.spent[lane] += said["seconds"]
        case_label = said["label"]
        self.run.tally.add(lane, case_label, said)
        if "fault" in said:
            if said.get("spoilt"):
                self._restart()
            self.run.found(lane, number, said)

    def _after_its_end(self):
        if self.child.ended == "exit 0":
            self.done = True
        elif self.case:
            self._fault(self.child.ended, self.child.last_words())
        else:
            raise RuntimeError(f"a worker ended by itself: {self.child.last_words()}")

    def _fault(self, kind, text):
        lane, number = self.case
        self.child.kill()
        label = label_of(lanes.make_case(lane, self.run.seed, number))
        self.run.tally.add(lane, label, {"fault": kind})
        self.run.found(lane, number, {"fault": kind, "text": text})
        self._restart()

    def _restart(self):
        self.child.kill()
        self._start()

    def _work(self, say):
        """In the process: run cases until the time is up."""
        end = time.monotonic() + self.run.left()
        while time.monotonic() < end:
            lane = min(self.spent, key=lambda name: self.spent[name] / self.run.shares[name])
            number = self.next[lane]
            self.next[lane] += self.run.workers
            say({"begin": [lane, number, self._resident()]})
            began = time.monotonic()
            case = json.loads(json.dumps(lanes.make_case(lane, self.run.seed, number)))
            said = outcome(case)
            said["seconds"] = time.monotonic() - began
            said["label"] = label_of(case)
            self.spent[lane] += said["seconds"]
            say(said)

    def _resident(self):
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
