"""A checkpoint that holds numbers of another dtype than the run's is refused, not converted."""

import pytest
import torch
from checks import refused

from adatape_kernels.models import adatape_vit
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.training.train_plan import TrainPlan

pytestmark = pytest.mark.runs_no_op


@pytest.fixture
def begun():
    """A model, its optimizer, and the tensors of a run in which every parameter was moved once."""
    options = dict(image_size=8, depth=1, dim=8, num_heads=2, ffn_dim=8, num_classes=2)
    model = adatape_vit("Ti/4", **options)
    optimizer = TrainPlan(epochs=1, batch=2, learning_rate=1e-3).optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer, checkpoint.tensors_of(model, optimizer)


def test_the_tensors_of_a_run_fit_it(begun, tmp_path):
    model, optimizer, tensors = begun
    checkpoint.restore(tmp_path, tensors, model, optimizer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["model.head.bias", "optimizer.head.bias.exp_avg", "optimizer.head.bias.step"]
)
def test_other_dtypes(begun, tmp_path, name, dtype):
    model, optimizer, tensors = begun
    before = model.head.bias.detach().clone()
    with refused(tmp_path / checkpoint.INDEX, "head.bias"):
        changed = {**tensors, name: tensors[name].to(dtype)}
        checkpoint.restore(tmp_path, changed, model, optimizer)
    assert torch.equal(model.head.bias, before)
