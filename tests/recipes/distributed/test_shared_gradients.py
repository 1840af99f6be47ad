"""In which order gradients are sent while a backward pass runs."""

import pytest
import torch
from rank_models import DATA, MODELS, NORMALISE, new_model

from adatape_kernels.recipes.distributed.shared_gradients import LossOfModel


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_computed_last_is_not_sent_with_a_layer(kind):
    model, came = new_model(kind), []
    layers = {*model.encoder.layers.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(came.append)
    model(NORMALISE(DATA.train_images)).logits.square().sum().backward()
    behind = 1 + max(place for place, parameter in enumerate(came) if parameter in layers)
    last = {*came[behind:]}
    assert last

    # DistributedDataParallel sends them from the end on.
    sent = [*LossOfModel(model).parameters()][::-1]
    places = {parameter: place for place, parameter in enumerate(sent)}
    assert min(places[each] for each in last) > max(places[each] for each in layers)


def test_each_parameter_is_sent_once_and_keeps_its_name():
    model = new_model("adatape")
    names = [name for name, _ in model.named_parameters()]
    wrapped = LossOfModel(model)
    assert sorted(map(id, wrapped.parameters())) == sorted(map(id, model.parameters()))
    assert [name for name, _ in wrapped.model.named_parameters()] == names
    assert torch.equal(wrapped.model.position, model.position)
