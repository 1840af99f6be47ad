"""When a bank's gradient passes all of its entries after all, with the limits as they are."""

import pytest
import torch
from reading_paths import all_entries, makes_rows_again
from torch import nn

import adatape_kernels as ak


def new_model():
    torch.manual_seed(0)
    model = ak.models.adatape_vit(
        "Ti/16",
        depth=1,
        image_size=64,
        num_classes=5,
        num_tape_tokens=2,
        topk=2,
        halt_threshold=99.0,
    )
    nn.init.normal_(model.head.weight)
    return model


# From 11 images on the bank has 2**17 elements.
MANY = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_model_takes_the_path_of_rows_at_all():
    assert makes_rows_again(new_model(), MANY)
    assert not makes_rows_again(new_model(), MANY[:8])


class Drop(nn.Module):
    """Drops half of a parameter at random, each time that it is read."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, w):
        keep = torch.rand_like(w) > 0.5
        self.drawn.append(keep)
        return w * keep


def test_a_random_parametrisation_of_the_position_is_drawn_once():
    model, drop = new_model(), Drop()
    nn.utils.parametrize.register_parametrization(model, "bank_position", drop)
    drop.drawn.clear()
    model(MANY).logits.square().sum().backward()
    (keep,) = drop.drawn
    gradient = model.parametrizations.bank_position.original.grad
    assert gradient[keep].any() and not gradient[~keep].any()


@pytest.mark.parametrize("shape", [(1, 1, 192), (64, 192)])
def test_a_position_of_another_shape_gets_its_gradient(shape):
    model = new_model()
    torch.manual_seed(2)
    model.bank_position = nn.Parameter(torch.randn(shape))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(MANY).logits.square().sum().backward()
        gradients.append(model.bank_position.grad.clone())
    with all_entries(model):
        model.zero_grad()
        model(MANY).logits.square().sum().backward()
    assert gradients[0].shape == shape
    torch.testing.assert_close(gradients[1], model.bank_position.grad)


def test_an_epsilon_of_zero_makes_no_nan():
    model = new_model()
    model.encoder.readers["0"].bank_norm.eps = 0.0
    for name in ("bank_embed.bias", "pre_bank.bias", "bank_position"):
        nn.init.zeros_(model.get_parameter(name))
    model(MANY, halt_threshold=0.0).logits.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["model", "reader"])
def test_inference_puts_no_condition_on_the_batch(kind):
    """A strict export has a batch of any size, below and above the limit."""
    from torch.export import Dim, export

    batch = Dim("batch")
    if kind == "model":
        module, inputs, shapes = new_model().eval(), (MANY[:3],), ({0: batch},)
    else:
        reader = ak.layers.TapeReader(64, num_tape_tokens=2, topk=2, halt_threshold=2.0)

        class Read(nn.Module):
            def __init__(self):
                super().__init__()
                self.reader = reader

            def forward(self, x, bank):
                return self.reader(x, bank, capacity=64)[0]

        module = Read().eval()
        inputs = torch.randn(3, 5, 64), torch.randn(3, 300, 64)
        shapes = {0: batch}, {0: batch}
    with torch.no_grad():
        program = export(module, inputs, dynamic_shapes=shapes, strict=True)
    assert program is not None


def test_inference_compiles_once_for_batches_on_both_sides_of_the_limit():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.compile(new_model().eval(), backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5, 16, 12):
            model(MANY[:batch].clone())
    assert counter.frame_count <= 2  # the second where a size turns out to be no constant
    torch._dynamo.reset()
