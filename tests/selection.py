"""Which cases of a test exist, and which of them other runs choose; conftest.py has the hooks.

A module names its op, or its ops, in OP. A test of it that takes `device` is generated for every
device and every backend that serves the op there; OP = None stands for code that no backend serves,
which runs once a device. A case whose parameters make a call that its backend does not serve is not
kept. What a case needs to say beyond its `dtype`, markers say:

    backends("triton")      the test is about these backends only
    no_backend              the test is about the reference, and calls no op
    absent_if(reason=f)     f(device, backend, **parameters) returns why there is no such
                            case, or None where there is
    needs_sanitizer         the test asserts nothing by itself: it is kept where a sanitizer watches
                            (the Makefile then sets ADATAPE_SANITIZER), and on a GPU

The markers `sanitize`, `sanitize_threads` and `instruction_sets` are given here, to cases of C++.
"""

import functools
import os

import pytest
import torch

from adatape_kernels.ops.implementation import FLOAT_DTYPES
from adatape_kernels.ops.op import BACKENDS, explain, registered_ops

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def ops_of(module):
    """The names of the ops in a module's OP, forward only."""
    named = getattr(module, "OP", None)
    return (named,) if isinstance(named, str) else tuple(named or ())


def with_backwards(ops):
    """Ops and, where they have one, the ops of their backwards."""
    names = [f"{op}{direction}" for op in ops for direction in ("", "_bwd")]
    return [name for name in names if name in registered_ops()]


def devices_and_backends(module, plain=False):
    """The (device, backend) pairs for which a module's tests are generated; plain: no backend."""
    ops = ops_of(module)
    if plain or not ops:
        return [(device, None) for device in DEVICES]
    return [
        (device, backend)
        for device in DEVICES
        for backend in BACKENDS
        if any(_refusal(ops, device, backend, dtype) is None for dtype in FLOAT_DTYPES)
    ]


@functools.cache  # thousands of cases ask the same few questions
def _refusal(ops, device, backend, dtype):
    for op in with_backwards(ops):
        reason = explain(op, device, dtype)[backend]
        if reason != "serves":
            return f"{op}: {backend}: {reason}"
    return None


def interpreted(device, backend):
    """Whether Triton's interpreter or CUDA's threads on the host serve, which is slow."""
    return device == "cpu" and backend in ("triton", "cuda")


def existing(items):
    """The cases of a test without those that cannot exist; if none is left, one says why, skipped.

    What is about a sanitizer is not even that where there is none.
    """
    kept, reasons = [], []
    for item in items:
        if item.get_closest_marker("needs_sanitizer") and not _watched(item):
            continue
        reason = _why_there_is_no_such_case(item)
        if reason is None:
            kept.append(item)
        else:
            reasons.append((item, reason))
    if not kept and reasons:
        item, reason = reasons[0]
        item.add_marker(pytest.mark.skip(reason=f"no backend here serves it ({reason})"))
        kept.append(item)
    return kept


def _watched(item):
    """Whether a sanitizer, or a GPU, sees a case that reads or writes where it may not."""
    device, _ = item.callspec.params["device"]
    return "ADATAPE_SANITIZER" in os.environ or device == "cuda"


def _why_there_is_no_such_case(item):
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    given = parameters.pop("device", (DEVICES[-1], None))
    if not isinstance(given, tuple):  # a parameter of the test's own
        return None
    device, backend = given
    ops = ops_of(item.module)
    if backend is not None:
        for marker in item.iter_markers("backends"):
            if backend not in marker.args:
                return f"it is about {' and '.join(marker.args)}"
        if parameters.get("threads", 1) > 1 and interpreted(device, backend):
            return "what runs kernels for a GPU on the host does not use torch's threads"
        dtype = parameters.get("dtype", _dtype_of(item.module, backend))
        reason = _refusal(ops, device, backend, dtype)
        if reason is not None:
            return reason
    for marker in item.iter_markers("absent_if"):
        reason = marker.kwargs["reason"](device=device, backend=backend, **parameters)
        if reason is not None:
            return reason
    return None


def _dtype_of(module, backend):
    """What tests without a `dtype` use: the module's DTYPE, perhaps by backend; else float32."""
    given = getattr(module, "DTYPE", torch.float32)
    return given.get(backend, torch.float32) if isinstance(given, dict) else given


def mark_for_other_runs(item):
    """Mark the cases that sanitizers, and each instruction set of the processor, run once more.

    Compilers and torch's own checks of an op (`compiles`) would show them nothing of our kernels,
    and where no kernel runs (`runs_no_op`) instructions differ in nothing. How work is shared out
    among threads is the same for all of them, so of cases of one thread and of two they run the
    first; those that compare numbers of threads are theirs too.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    given = parameters.get("device")
    _, backend = given if isinstance(given, tuple) else (None, None)
    if backend not in ("cpp", "cuda") or item.get_closest_marker("compiles"):
        return
    several = parameters.get("threads") == 2 or item.get_closest_marker("several_threads")
    if backend == "cpp":
        item.add_marker("sanitize")
        if parameters.get("threads") != 2 and not item.get_closest_marker("runs_no_op"):
            item.add_marker("instruction_sets")
        if several:
            item.add_marker("sanitize_threads")
        return
    if not item.get_closest_marker("many_emulated_threads"):
        item.add_marker("sanitize")
    if item.get_closest_marker("few_emulated_threads"):
        item.add_marker("sanitize_threads")
