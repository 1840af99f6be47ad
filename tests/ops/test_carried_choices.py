"""A compiled backward pass runs on what was chosen around its forward pass, like an eager one."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from derivative_cases import OFFSETS
from torch.autograd.graph import save_on_cpu
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import adatape_kernels as ak
from adatape_kernels.op_types import FFN
from adatape_kernels.ops.dual_ffn.products import chosen_products
from adatape_kernels.ops.op import operation, record, use_backend, why_absent

needs_two = pytest.mark.skipif(
    why_absent("cpp") is not None, reason="one backend is no choice on a CPU"
)
FORWARD, AROUND, EXPECTED = zip(
    ("eager", None, "eager"),
    ("cpp", None, "cpp"),
    (None, None, "cpp"),
    ("eager", "cpp", "cpp"),
    ("cpp", "eager", "eager"),
    strict=True,
)


def chain(query, bank):
    """Every op with a derivative, save the one that `products` is about."""
    tape, offsets, selection = ak.ops.tape_read(
        query, bank, num_tape_tokens=4, topk=2, halt_threshold=0.7
    )
    batch = ak.ElasticBatch.from_padded(query.unsqueeze(1))
    batch = batch.append_tape(tape, offsets, max_tapes=4)
    heads = batch.data.view(-1, 2, 4)
    out = ak.ops.elastic_attention(heads, heads, heads, batch.cu_inputs, batch.cu_tapes)
    total, normed = ak.ops.add_layer_norm(
        out.flatten(1), batch.data, bank.new_ones(8), bank.new_zeros(8)
    )
    return (total * normed).sum() + selection.ponder.sum()


def given():
    return torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)


def forced(backend):
    return contextlib.nullcontext() if backend is None else use_backend(backend)


def backward(out, around=None, *, on_a_thread=False):
    """Run the backward pass; return the backends that it ran on."""

    def run():
        with forced(around), record() as ran:
            out.backward()
        backends.update(each.backend for each in ran)

    backends = set()
    if on_a_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    return backends


@needs_two
@pytest.mark.compiles
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_backward_takes_its_forward_s_backend(compiler, fresh_compiler):
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(chain, fullgraph=True, backend=compiler)
    for forward, around, expected in zip(FORWARD, AROUND, EXPECTED, strict=True):
        for on_a_thread in (False, True):
            query, bank = given()
            (wanted,) = torch.autograd.grad(chain(query, bank), query)
            with forced(forward):
                out = compiled(query, bank)
            assert backward(out, around, on_a_thread=on_a_thread) == {expected}
            torch.testing.assert_close(query.grad, wanted, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1, "a choice has compiled the graph anew"


@needs_two
@pytest.mark.compiles
def test_forwards_and_backwards_may_interleave(fresh_compiler):
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    outputs = []
    for backend in ("eager", "cpp", "eager"):
        with use_backend(backend):
            outputs.append(compiled(*given()))
    assert [backward(out) for out in outputs[::-1]] == [{"eager"}, {"cpp"}, {"eager"}]


@needs_two
@pytest.mark.compiles
def test_a_choice_inside_a_compiled_function(fresh_compiler):
    def inside(query, bank):
        with use_backend("eager"):
            out = chain(query, bank)
        return out * 2

    out = torch.compile(inside, backend="aot_eager")(*given())
    assert backward(out) == {"eager"}


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["grouped", "cublas", None])
def test_the_form_of_products(form, fresh_compiler, monkeypatch):
    seen = []
    given = operation("dual_ffn_bwd")
    eager = given.implementations["eager"]

    def noting(*args):
        seen.append(chosen_products())
        return eager.function(*args)

    given.replace("eager", dataclasses.replace(eager, function=noting))
    try:
        parameters = [torch.randn(6, 4), torch.randn(6), torch.randn(4, 6), torch.randn(4)]
        ffn = FFN(*parameters)
        compiled = torch.compile(
            lambda x: ak.ops.dual_ffn(x, 3, ffn).sum(), fullgraph=True, backend="aot_eager"
        )
        with use_backend("eager"), ak.ops.ffn_products(form):
            out = compiled(torch.randn(3, 4, requires_grad=True))
        with ak.ops.ffn_products("cublas" if form == "grouped" else "grouped"):
            assert backward(out) == {"eager"}
    finally:
        given.replace("eager", eager)
    assert seen == [form]


@pytest.mark.compiles
def test_what_stands_in_the_graphs(fresh_compiler):
    """One op more in a forward pass, of a shape known beforehand, which CUDA graphs ask for."""
    # Torch's compiler takes seconds to import, for which a run of other tests is not to wait.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    torch.compile(chain, fullgraph=True, backend=compiler)(*given()).backward()
    forward, later = ([str(node.target) for node in graph.graph.nodes] for graph in graphs)
    assert forward.count("adatape_carrying.present.default") == 1
    assert not [name for name in later if name.startswith("adatape.")]
    assert sum(name.startswith("adatape_carrying.") for name in later) == 3
    (present,) = (n for n in graphs[0].graph.nodes if "carrying" in str(n.target))
    assert tuple(present.meta["val"].shape) == (0,)


@pytest.mark.parametrize(
    "trace",
    [
        lambda f, args: torch.export.export(f, args, strict=True).graph,
        lambda f, args: torch.export.export(f, args, strict=False).graph,
        lambda f, args: make_fx(f)(*args).graph,
    ],
    ids=["export", "export by running", "make_fx"],
)
def test_a_traced_forward_carries_nothing(trace):
    class Attending(torch.nn.Module):
        def forward(self, q):
            return ak.ops.elastic_attention(q, q, q, *OFFSETS).sum()

    graph = trace(Attending(), (torch.randn(7, 2, 4, requires_grad=True),))
    targets = [str(node.target) for node in graph.nodes]
    assert "adatape.elastic_attention.default" in targets
    assert not [name for name in targets if "carrying" in name]


@needs_two
@pytest.mark.compiles
def test_where_saved_tensors_lose_the_choice_the_default_serves(fresh_compiler):
    def moved(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    query, bank = given()
    (wanted,) = torch.autograd.grad(chain(query, bank), query)
    with use_backend("eager"), torch.autograd.graph.saved_tensors_hooks(moved, moved):
        out = compiled(query, bank)
    backward(out)
    torch.testing.assert_close(query.grad, wanted, atol=1e-4, rtol=1e-4)
    lost = torch.empty(0)
    with record() as ran:
        torch.ops.adatape_carrying.tape_gather(
            torch.ones(1, 2),
            *(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1)),
            *(torch.ones(1, dtype=torch.int32), None),
            carried=lost,
        )
    assert {each.backend for each in ran} == {"cpp"}
    with save_on_cpu(), use_backend("eager"):
        out = compiled(*given())
    assert backward(out) <= {"eager", "cpp"}


@pytest.mark.compiles
def test_flops_of_a_backward_are_counted_alike(fresh_compiler):
    def flops(out):
        with FlopCounterMode(display=False) as counted:
            out.backward()
        return counted.get_total_flops()

    case = given()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert flops(compiled(*case)) == flops(chain(*case)) > 0
