"""Which cases `--cases-of-a-kind N` keeps: at most N of each kind, to test a machine in minutes.

A kind is a test, a device, a backend, a dtype, an op and a form of `dual_ffn`, so that none of
these loses all its cases. Of more than N those are kept that lie evenly among the others, the first
and the last included: always the same ones.
"""

KIND = ("device", "dtype", "op", "products")
"""The parameters that make a kind; "device" has the backend with it."""


def kind_of(item):
    """What a case has in common with those that may stand for it."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.path, item.originalname, *(parameters.get(name) for name in KIND)


def sample(items, most):
    """Return at most so many of each kind, in the order of the items."""
    kinds = {}
    for item in items:
        kinds.setdefault(kind_of(item), []).append(item)
    kept = set()
    for cases in kinds.values():
        last, chosen = len(cases) - 1, min(most, len(cases))
        kept |= {id(cases[i * last // max(chosen - 1, 1)]) for i in range(chosen)}
    return [item for item in items if id(item) in kept]
