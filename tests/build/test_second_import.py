"""The package dropped from sys.modules and imported anew, as notebooks and test runners do."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`torch.jit.script")  # torch's own, in its forward mode
offsets = [torch.tensor(o, dtype=torch.int32) for o in ([0, 2], [2, 3])]
q = torch.linspace(-1, 1, 12).view(3, 1, 4).requires_grad_()

def results(ak):
    def scalar(q):
        return ak.ops.elastic_attention(q, q, q, *offsets).square().sum()

    (grad,) = torch.autograd.grad(scalar(q), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), q)
    _, tangent = torch.func.jvp(scalar, (q.detach(),), (torch.ones_like(q),))
    mapped = torch.func.vmap(torch.func.grad(scalar))(torch.stack([q.detach()] * 2))
    with FlopCounterMode(display=False) as flops:
        scalar(q)
    assert flops.get_total_flops() > 0
    tape, *_ = ak.ops.tape_read(
        q.detach()[:2, 0], q.detach()[:, 0], num_tape_tokens=1, topk=1, halt_threshold=1.0
    )
    return grad, second, tangent, mapped, tape

imports, expected = [], None
for _ in range(3):
    import adatape_kernels as ak

    imports.append(ak)
    found = results(ak)
    expected = expected or found
    assert all(map(torch.equal, found, expected))
    from adatape_kernels.ops.op import record

    for earlier in imports:  # what came before goes on working, and its choices count as well
        with record() as ran, earlier.use_backend("eager"):
            results(earlier)
        assert {each.backend for each in ran} == {"eager"}, ran
    compiled = torch.compile(
        lambda q: ak.ops.elastic_attention(q, q, q, *offsets), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q), ak.ops.elastic_attention(q, q, q, *offsets))
    layer = ak.layers.ElasticEncoderLayer(4, 1, 8)
    layer(ak.ElasticBatch.from_padded(q.view(1, 3, 4))).data.sum().backward()
    for name in [n for n in sys.modules if n.split(".")[0] == "adatape_kernels"]:
        del sys.modules[name]
print("done")
"""


AFTER_A_FAILURE = """
import importlib, sys
import torch
import adatape_kernels as first

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ImportError(name)

def purge():
    for name in [n for n in sys.modules if n.split(".")[0] == "adatape_kernels"]:
        del sys.modules[name]

def use(ak):
    layer = ak.layers.ElasticEncoderLayer(4, 1, 8)
    x = torch.ones(1, 3, 4, requires_grad=True)
    layer(ak.ElasticBatch.from_padded(x)).data.sum().backward()
    compiled = torch.compile(lambda x: layer(ak.ElasticBatch.from_padded(x)).data.sum(),
                             fullgraph=True, backend="aot_eager")
    compiled(x).backward()

finder = Absent()
for finder.name in ("scenic", "ops.dual_ffn", "ops.carried_choice", "ops.registration"):
    finder.name = f"adatape_kernels.{finder.name}"
    purge()
    sys.meta_path.insert(0, finder)
    try:
        import adatape_kernels
    except ImportError as error:
        assert str(error) == finder.name
    else:
        raise AssertionError("the import has not failed")
    sys.meta_path.remove(finder)
    use(first)
purge()
import adatape_kernels as second

use(second)
use(first)
for name in ("ops.dual_ffn", "ops.carried_choice", "ops.registration", "ops.op"):
    importlib.reload(sys.modules[f"adatape_kernels.{name}"])
    use(second)
importlib.reload(second)
use(second)
print("done")
"""


@pytest.mark.parametrize("script", [SCRIPT, AFTER_A_FAILURE], ids=["purge", "failure"])
def test_the_package_can_be_imported_again_and_again(script):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "done"
