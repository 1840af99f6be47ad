"""Derivatives in the fast way and in the public one: adatape_kernels/ops/fast_autograd.py."""

import os
import subprocess
import sys

import pytest
import torch

from adatape_kernels.ops import fast_autograd
from adatape_kernels.ops.attach_derivative import attach

# One module of ours sees a torch without some names. Torch itself, which uses them too, has them.
# Torch and its compiler are imported once; each form of our package has a process of its own.
SCRIPT = """
import contextlib, gc, hashlib, importlib.util, os, pathlib, sys, torch
import torch._dynamo, torch._dynamo.backends.debugging, torch.utils.checkpoint

class Without:
    def __init__(self, module, names, **changed):
        self.__dict__.update(changed, module=module, names=names)

    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(name)
        return getattr(self.module, name)

def digest(hidden):
    package = pathlib.Path(importlib.util.find_spec("adatape_kernels").origin).parent
    spec = importlib.util.spec_from_file_location(
        "adatape_kernels.ops.fast_autograd", package / "ops/fast_autograd.py"
    )
    fast_autograd = importlib.util.module_from_spec(spec)
    sys.modules["torch"] = Without(torch, (), _C=Without(torch._C, hidden))
    spec.loader.exec_module(fast_autograd)
    sys.modules.update({"torch": torch, spec.name: fast_autograd})
    import adatape_kernels as ak
    assert ak.ops.op.fast_autograd is fast_autograd
    assert set(fast_autograd.missing_names()) == set(hidden)

    torch.manual_seed(0)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([4, 4, 6], dtype=torch.int32)
    x, w, b = torch.randn(6, 8), torch.randn(8, 8), torch.randn(8)

    def read(x, w, b):
        tape, _, selection = ak.ops.tape_read(
            x, torch.stack([w] * 6), num_tape_tokens=2, topk=2, halt_threshold=1.0, capacity=12
        )
        return tape.sum() + selection.ponder.sum()

    def encode(x, w, b):
        total, normed = ak.ops.add_layer_norm(x, x * 2, b, b)
        heads = normed.view(6, 2, 4)
        out = ak.ops.elastic_attention(heads, heads, heads, *offsets).reshape(6, 8)
        return (total + ak.ops.dual_ffn(out, 4, ak.ops.FFN(w, b, w, b))).square().sum()

    found = hashlib.sha256()
    with ak.use_backend("eager"):
        for function in (read, encode):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for run in (function, compiled):
                leaves = [t.clone().requires_grad_() for t in (x, w, b)]
                grads = torch.autograd.grad(run(*leaves), leaves, allow_unused=True)
                if run is function:
                    expected = grads
                for grad, same in zip(grads, expected, strict=True):
                    if grad is not None:
                        torch.testing.assert_close(grad, same, rtol=1e-6, atol=1e-6)
            for grad in expected:
                found.update(b"none" if grad is None else grad.numpy().tobytes())
    return found.hexdigest()

torch.set_num_threads(1)

# What a first compilation takes its time for, and what our package imports, is there before the
# forks. Nothing asks for a gradient, for which a torch with CUDA would start threads of autograd.
def warm(x, w):
    return (torch.stack([w] * 2) @ x.square()).softmax(-1).sum()

torch.compile(warm, fullgraph=True, backend="aot_eager")(torch.ones(2), torch.ones(2))
modules = ["torch._inductor.lowering", "torch._inductor.kernel.custom_op", "yaml"]
modules += ["torch._inductor.pattern_matcher", "torch.nn.utils.prune"]
modules += ["torch._library._out_variant"]
modules += ["huggingface_hub.hub_mixin", "numpy", "triton"]
for name in modules:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()  # nobody looks for garbage among all this again
for line in sys.stdin.read().splitlines():
    if (child := os.fork()) == 0:
        # Torch gives a child of a fork a new thread pool when the pool is next used, and two
        # threads that use it at once can find none. Here there is one thread still.
        torch.set_num_threads(1)
        print(line, digest(line.split()), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"without {line}"
"""


@pytest.mark.compiles
def test_where_torch_lacks_a_private_name_gradients_are_the_same():
    """A digest of every op's gradients, where torch has all names, lacks one, and lacks all."""
    assert not fast_autograd.missing_names()
    hidden = ["", *fast_autograd.PRIVATE_NAMES, " ".join(fast_autograd.PRIVATE_NAMES)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        input="\n".join(hidden),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = dict(line.rpartition(" ")[::2] for line in result.stdout.splitlines())
    assert list(found) == hidden
    assert set(found.values()) == {found[""]}


@pytest.fixture(params=[True, False], ids=["public", "fast"])
def cube(request):
    """An op `cube` with its derivative, which counts its calls, attached in one of the ways."""
    library = torch.library.Library("adatape_cube", "DEF")
    library.define("cube(Tensor x, float scale) -> (Tensor y, Tensor square)")
    backwards = []

    def run(x, scale):
        return scale * x**3, x**2

    def backward(ctx, dy, dsquare):
        (x,) = ctx.saved_tensors
        backwards.append(x)
        grad = 3 * ctx.scale * x**2 * dy
        return grad if dsquare is None else grad + 2 * x * dsquare, None

    def setup_context(ctx, inputs, output):
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    library.impl("cube", run, "CompositeExplicitAutograd")
    fake = lambda x, scale: (torch.empty_like(x), torch.empty_like(x))  # noqa: E731
    torch.library.register_fake("adatape_cube::cube", fake, lib=library)
    attach(library, "cube", run, backward, setup_context, public=request.param)
    yield torch.ops.adatape_cube.cube.default, backwards
    library._destroy()


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_op_passes_torch_s_check_in_both_ways(cube, requires_grad):
    op, _ = cube
    torch.library.opcheck(op, (torch.randn(3, requires_grad=requires_grad), 2.0))


def test_a_derivative_is_used_where_one_is_asked_for(cube):
    op, backwards = cube
    x = torch.randn(3, dtype=torch.float64)
    y, square = op(x, 2.0)
    assert not y.requires_grad and torch.equal(y, 2 * x**3) and torch.equal(square, x**2)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not op(leaf, 2.0)[0].requires_grad
    y, square = op(leaf, 2.0)
    assert backwards == []
    (grad,) = torch.autograd.grad(y.sum() + square.sum(), leaf)
    torch.testing.assert_close(grad, 6 * x**2 + 2 * x)
    assert len(backwards) == 1
    assert torch.autograd.gradcheck(lambda x: op(x, 2.0), leaf)


@pytest.mark.compiles
def test_a_derivative_compiles_in_both_ways(cube, fresh_compiler):
    op, _ = cube
    leaf = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: op(x, 2.0)[0].sum(), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(grad, 6 * leaf.detach() ** 2)


def test_vmap_and_modes_see_the_op(cube):
    """What torch puts around a call sees it whichever way the derivative came."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            seen.append(called)
            return called(*args, **(kwargs or {}))

    op, _ = cube
    with Watching():
        op(torch.randn(3, requires_grad=True), 2.0)
    assert op in seen
