"""A model with a capacity needs no value on the host, so that a CUDA graph can hold it.

Here its Triton kernels are launched on meta tensors, which have no values: a copy to the host, in
the launchers, the layers or the backward, is an error. What is launched is what a GPU would run.
"""

import pytest
import torch
from reading_paths import of_any_size
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels.models import adatape_vit
from adatape_kernels.ops import triton_runtime
from adatape_kernels.ops.composition import compositions
from adatape_kernels.ops.op import operation, registered_ops

pytestmark = pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")

OPS = ("tape_select", "tape_gather", "elastic_attention", "add_layer_norm")


class TritonLaunchers(TorchDispatchMode):
    """Sends every op of ours to its Triton launcher, which on meta tensors would not be asked."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        namespace, _, name = op._schema.name.partition("::")
        if namespace != "adatape":
            return op(*args, **(kwargs or {}))
        self.seen.add(name)
        if name in registered_ops():
            return operation(name).implementations["triton"].function(*args)
        with self:
            return {each.name: each.function for each in compositions()}[name](*args)


def launched(launches, direction):
    """Return the ops of OPS that have launched a kernel of theirs."""
    names = [launch.kernel.__name__ for launch in launches]
    return {op for op in OPS if any(name.startswith(f"_{op}_{direction}_") for name in names)}


@pytest.mark.parametrize("bank", ["input", "learn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["all", "read"])
def test_no_value_reaches_the_host(dtype, bank, rows, request):
    if rows == "read":
        request.getfixturevalue(of_any_size.__name__)
    with torch.device("meta"):
        model = adatape_vit(
            "Ti/16",
            image_size=48,
            depth=2,
            num_classes=10,
            bank=bank,
            bank_size=50,
            num_tape_tokens=3,
            topk=2,
            read_layers=(0, 1),
            tape_ffn_dim=64,
            tape_mlp_dim=32,
        ).to(dtype)
        images, labels = torch.empty(4, 3, 48, 48, dtype=dtype), torch.empty(4, dtype=torch.int64)
        with TritonLaunchers() as ops:
            with triton_runtime.recording() as forward:
                loss = model.loss(model(images, capacity=9), labels)
            with triton_runtime.recording() as backward:
                loss.backward()
    assert ("tape_read_again" in ops.seen) == (rows == "read" and bank == "input")
    assert launched(forward, "fwd") == set(OPS)
    # A key is a whole row of these banks, whose gradient is then made where those of the keys are.
    merged = {"tape_gather"} if bank == "input" else set()
    assert launched(backward, "bwd") == set(OPS) - merged
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_a_capacity_the_number_of_rows_does():
    with torch.device("meta"), triton_runtime.recording(), TritonLaunchers():
        model = adatape_vit("Ti/16", image_size=32, depth=1, num_tape_tokens=3, topk=2)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            model(torch.empty(4, 3, 32, 32))
