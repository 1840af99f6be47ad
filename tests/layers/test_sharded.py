"""Models and layers under `fully_shard` and DistributedDataParallel, on one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import adatape_kernels as ak

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model():
    torch.manual_seed(0)
    return ak.models.adatape_vit(
        *("Ti/4",),
        **{"image_size": 8, "depth": 2, "num_classes": 5, "dim": 16, "num_heads": 2},
        **{"ffn_dim": 16, "num_tape_tokens": 2, "topk": 2},
    )


def trained(module):
    """The parameters after two steps, and the last logits."""
    images, labels = torch.linspace(-1, 1, 3 * 3 * 64).view(3, 3, 8, 8), torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        out = module(images)
        getattr(module, "module", module).loss(out, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {
        name.removeprefix("module."): value.full_tensor()
        if hasattr(value, "full_tensor")
        else value
        for name, value in module.state_dict().items()
    }
    return whole, out.logits.detach()


def sharded(module, mesh, kinds, **policy):
    for inner in reversed([m for m in module.modules() if isinstance(m, kinds)]):
        fully_shard(inner, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return fully_shard(module, mesh=mesh)


KINDS = {
    "whole": (),
    "encoder layers": ak.layers.ElasticEncoderLayer,
    "attentions": ak.layers.ElasticAttention,
    "linears": (nn.Linear, nn.LayerNorm),
    "readers": (ak.layers.TapeReader, ak.layers.ElasticEncoderLayer),
}


@pytest.mark.parametrize("kinds", KINDS)
def test_sharding_changes_nothing(mesh, kinds):
    expected, logits = trained(model())
    actual, sharded_logits = trained(sharded(model(), mesh, KINDS[kinds]))
    torch.testing.assert_close(sharded_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_sharded_layers_compute_in_the_dtype_of_their_policy(mesh):
    seen = []
    module = model()
    layer = next(m for m in module.modules() if isinstance(m, ak.layers.ElasticEncoderLayer))
    layer.linear1.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    kinds = KINDS["encoder layers"]
    policy = {"param_dtype": torch.bfloat16, "output_dtype": torch.float32}
    _, logits = trained(sharded(module, mesh, kinds, **policy))
    assert set(seen) == {torch.bfloat16} and logits.dtype == torch.float32
    torch.testing.assert_close(logits, trained(model())[1], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_data_parallel_changes_nothing(mesh, options):
    expected, logits = trained(model())
    actual, parallel_logits = trained(DistributedDataParallel(model(), **options))
    torch.testing.assert_close(parallel_logits, logits)
    torch.testing.assert_close(actual, expected)


def gradients_of_hooks(module, hooked):
    """What hooks on some modules saw in one step, in the order in which they ran."""
    seen = []
    for each in hooked:
        each.register_full_backward_pre_hook(lambda m, grad: seen.append(grad))
        each.register_full_backward_hook(lambda m, gi, go: seen.append((*gi, *go)))
    images = torch.linspace(-1, 1, 3 * 3 * 64).view(3, 3, 8, 8).requires_grad_()
    getattr(module, "module", module).loss(module(images), torch.tensor([0, 1, 2])).backward()
    return seen


def elastic(module):
    kinds = (ak.layers.ElasticEncoder, ak.layers.ElasticEncoderLayer, ak.layers.TapeReader)
    return [m for m in module.modules() if isinstance(m, (ak.models.AdaTapeViT, *kinds))]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("wrapper", ["fully_shard", "DistributedDataParallel"])
def test_backward_hooks_see_the_same_gradients(mesh, wrapper):
    expected = gradients_of_hooks(plain := model(), elastic(plain))
    assert len(expected) == 2 * len(elastic(plain)) == 10
    module = model()
    hooked = elastic(module)
    if wrapper == "fully_shard":
        module = sharded(module, mesh, KINDS["readers"])
    else:
        module = DistributedDataParallel(module)
    actual = gradients_of_hooks(module, hooked)
    for found, wanted in zip(actual, expected, strict=True):
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-5)
