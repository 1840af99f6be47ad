"""Loops of halting steps written out for each unit, from SPEC 11 and 12, on padded examples.

They share no code with the package: one example at a time, its rows in a list, halting decided by
Python's numbers, and outputs summed up by the closed forms.
"""

from dataclasses import dataclass

import torch


@dataclass
class Unit:
    """One example or row that may halt."""

    score: float = 0.0
    steps: int = 0
    halted: bool = False
    remainder: object = 0.0


def literal_act(blocks, unit, x, threshold, update="basic", level="example", force=False):
    """ACT on one example, x (rows, dim): halted rows stay in sight of the others.

    unit(x) gives the probabilities of its rows. Returns y, steps, remainders, rows computed.
    """
    number = 1 if level == "example" else len(x)
    units = [Unit() for _ in range(number)]
    left = [torch.ones((), dtype=x.dtype) for _ in range(number)]
    y, computed = torch.zeros_like(x), 0
    for n, block in enumerate(blocks):
        if all(each.halted for each in units):
            break
        p = unit(x)
        p = [p.mean()] if level == "example" else list(p)
        x = block(x)
        computed += len(x)
        weights = []
        for i, each in enumerate(units):
            if each.halted:
                weights.append(torch.zeros((), dtype=x.dtype))
                continue
            each.steps += 1
            if each.score + float(p[i].detach()) > threshold or (force and n == len(blocks) - 1):
                each.halted, each.remainder = True, left[i]
                weights.append(left[i])
                continue
            weights.append(p[i])
            each.score += float(p[i].detach())
            left[i] = left[i] - p[i]
            each.halted = each.score >= threshold
        w = torch.stack(weights).expand(len(x)) if level == "example" else torch.stack(weights)
        w = w.unsqueeze(1)
        y = w * x + (1 - w) * y if update == "basic" else y + w * x
    return y, [u.steps for u in units], [u.remainder for u in units], computed


def literal_rows_that_leave(blocks, gate, x, threshold, update, force, before, at_threshold=True):
    """One example, x (rows, dim), whose rows leave as they halt.

    gate(x) gives the probabilities of rows: of those that go into a block where `before`, else of
    those that come out. Returns y, steps, remainders, rows computed.
    """
    alive, y = list(range(len(x))), [torch.zeros_like(row) for row in x]
    units = [Unit() for _ in x]
    left = [torch.ones((), dtype=x.dtype) for _ in x]
    computed = 0
    for n, block in enumerate(blocks):
        if not alive:
            break
        p = gate(x) if before else None
        x = block(x)
        computed += len(x)
        p = gate(x) if p is None else p
        stay = []
        for place, row in enumerate(alive):
            each = units[row]
            each.steps += 1
            reached = each.score + float(p[place].detach())
            last = force and n == len(blocks) - 1
            if reached > threshold or last:
                w, each.remainder = left[row], left[row]
            else:
                w, left[row] = p[place], left[row] - p[place]
                each.score = reached
                if reached < threshold:
                    stay.append(place)
                elif not at_threshold:
                    continue
            y[row] = w * x[place] + ((1 - w) * y[row] if update == "basic" else y[row])
        alive = [alive[place] for place in stay]
        x = x[stay]
    y = torch.stack(y) if y else x
    return y, [u.steps for u in units], [u.remainder for u in units], computed
