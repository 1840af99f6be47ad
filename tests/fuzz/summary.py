"""Counts what ran, and prints it as a table."""

import collections


def label_of(case):
    """Return what a case is counted under: an op, a kind of model, a format."""
    return case.get("op") or case.get("format") or case["kind"]


class Tally:
    """Counts by lane and label."""

    def __init__(self):
        self.rows = collections.defaultdict(collections.Counter)
        self.seconds = 0.0
        self.recycled = 0

    def add(self, lane, label, said):
        """Count a case that ended, whatever its end was."""
        row = self.rows[lane, label]
        row["cases"] += 1
        row["valid"] += bool(said.get("valid"))
        row["faults"] += "fault" in said
        row["calls"] += sum(said.get("calls", {}).values())

    def total(self, name):
        return sum(row[name] for row in self.rows.values())

    def lines(self, seed):
        """Yield the table."""
        names = ("cases", "valid", "refused", "calls", "faults")
        yield f"{'lane':<10}{'of':<22}" + "".join(f"{name:>10}" for name in names)
        for (lane, label), row in sorted(self.rows.items()):
            row["refused"] = row["cases"] - row["valid"] - row["faults"]
            yield f"{lane:<10}{label:<22}" + "".join(f"{row[name]:>10,}" for name in names)
        sums = "".join(f"{self.total(name):>10,}" for name in names)
        yield f"{'all':<32}{sums}"
        again = f", {self.recycled} workers ended for what they held" if self.recycled else ""
        yield f"seed {seed}, {self.seconds:.0f} s{again}"
