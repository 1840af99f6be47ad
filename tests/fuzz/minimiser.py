"""Makes a failing case smaller while it fails in the same way."""

import time


def minimised(case, fault, run, seconds):
    """Return the smallest case found within a time, and the number of runs that it took.

    Args:
        case: the JSON object that fails.
        fault: the kind of its fault, which a smaller case must share.
        run: returns the kind of a case's fault, or None.
        seconds: after which no further run begins.
    """
    end, runs, tried = time.monotonic() + seconds, 0, set()
    progress = True
    while progress:
        progress = False
        for smaller in simpler(case):
            if repr(smaller) in tried:
                continue
            if time.monotonic() > end:
                return case, runs
            tried.add(repr(smaller))
            runs += 1
            if run(smaller) == fault:
                case, progress = smaller, True
                break
    return case, runs


def simpler(case):
    """Yield cases that are simpler in one respect, the boldest first."""
    for key, value in case.items():
        if key in _KEPT:
            continue
        for other in _simpler_value(key, value):
            yield {**case, key: other}


_OPTIONAL = ("read_mask", "bank_lens", "softmax_scale", "branch_dtype", "index_dtype")
_KEPT = ("area", "backend", "op", "seed", "kind", "format", "made")


_LEAVE = ("wrong", "changes", "breakages", "mutations")
"""Lists whose elements are left out or kept, as they are."""


def _simpler_value(key, value):
    if key == "dtype" and value != "float32":
        yield "float32"
    if key == "level" and value != "public":
        yield "public"
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        yield from dict.fromkeys(n for n in (0, 1, value // 2, value - 1) if 0 <= n < value)
    elif isinstance(value, float):
        yield from (x for x in (0.0, 1.0) if abs(x) < abs(value))
    elif isinstance(value, list):
        yield from _simpler_list(value, key not in _LEAVE)
    elif isinstance(value, dict):
        yield from _without_example(value)
        for name in value:
            if key in ("values", "layouts"):
                yield {n: v for n, v in value.items() if n != name}
        for name, inner in value.items():
            if inner is not None and name in _OPTIONAL:
                yield {**value, name: None}
            for other in _simpler_value(name, inner):
                if other or key != "fields":  # a model of no width is none
                    yield {**value, name: other}


def _simpler_list(value, inside):
    half = len(value) // 2
    if half > 1:
        yield value[:half]
        yield value[half:]
    for i in range(len(value)):
        yield value[:i] + value[i + 1 :]
    for i, inner in enumerate(value if inside else ()):
        if isinstance(inner, int | float | list) and not isinstance(inner, bool):
            for other in _simpler_value("", inner):
                yield [*value[:i], other, *value[i + 1 :]]


def _without_example(sizes):
    """Yield sizes without one example, which several lists of one length describe."""
    lists = {name: value for name, value in sizes.items() if isinstance(value, list)}
    if len(lists) < 2 or len({len(value) for value in lists.values()}) != 1:
        return
    for i in range(len(next(iter(lists.values())))):
        yield sizes | {name: value[:i] + value[i + 1 :] for name, value in lists.items()}
