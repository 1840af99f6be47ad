"""A graph of a step that needs no GPU: what torch computes is noted down once, and computed again.

As in a CUDA graph no Python runs in a replay, addresses and numbers are those of the capture, and
what asks the host for a value cannot be captured.
"""

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Recording(TorchDispatchMode):
    """Computes operations and notes them down; raises where one brings a value to the host."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.made, self.changed = set(), []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = function._overloadpacket.__name__
        devices = {t.device.type for t in _tensors((arguments, named))}
        leaves = function is torch.ops.aten._to_copy.default and named.get("device") is not None
        if name in REFUSED or (leaves and devices == {"cuda"} and named["device"].type == "cpu"):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        written = _written(function, arguments, named)
        for tensor in written:
            if id(tensor) not in self.made:
                self.made.add(id(tensor))
                self.changed.append((tensor, tensor.detach().clone()))
        results = function(*arguments, **named)
        new = [t for t in _tensors(results) if not any(t is w for w in written)]
        # A view of what was there before is no tensor that the capture has made.
        inputs = _tensors((arguments, named))
        if not _is_view(function) or all(id(t) in self.made for t in inputs):
            self.made.update(map(id, new))
        self.noted.append((function, arguments, named, new, written))
        return results

    @torch.no_grad()
    def put_back(self):
        """Undo what the capture has changed, as a capture computes nothing."""
        for tensor, values in self.changed:
            tensor.copy_(values)

    @torch.no_grad()
    def replay(self):
        for function, arguments, named, kept, written in self.noted:
            results = function(*arguments, **named)
            new = [t for t in _tensors(results) if not any(t is w for w in written)]
            for old, tensor in zip(kept, new, strict=True):
                if old is not tensor and not _is_view(function):
                    old.copy_(tensor)


def _tensors(values):
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _is_view(function):
    """Whether a result lies where an argument does, so that it need not be written."""
    return any(r.alias_info is not None for r in function._schema.returns)


def _written(function, arguments, named):
    found = []
    for number, each in enumerate(function._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            value = arguments[number] if number < len(arguments) else named.get(each.name)
            found += _tensors(value)
    return found


class RecordedGraph:
    """Stands for `graphed_step.StepGraph`."""

    made: ClassVar[list] = []

    def __init__(self, device):
        self.captures = self.replays = 0
        self.made.append(self)

    def warm_up(self, step):
        step()
        step()

    def captured(self, step):
        recording = Recording()
        with torch.random.fork_rng([]), recording:  # a capture draws no numbers
            sums = step()
        recording.put_back()
        self.captures += 1

        def replay():
            self.replays += 1
            recording.replay()
            return sums

        return replay
