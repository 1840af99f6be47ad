"""The loss of each class's sigmoid, beside torch's, for every kind of model, elastic and padded."""

import pytest
import torch
import torch.nn.functional as F
from checks import refused

from adatape_kernels.models import create_model
from adatape_kernels.models.cross_entropy import classification_loss

NAMES = ("adatape", "vit", "uvit", "u2t", "avit")
SMALL = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "num_heads": 2, "ffn_dim": 8}
LABELS = torch.tensor([4, 0, 2])


def literal(logits, targets):
    """The sum over classes of each one's cross entropy, the mean of the examples."""
    total = 0.0
    for row, target in zip(logits.double().tolist(), targets.double().tolist(), strict=True):
        for logit, wanted in zip(row, target, strict=True):
            probability = 1 / (1 + torch.tensor(-logit, dtype=torch.float64).exp())
            total -= wanted * probability.log() + (1 - wanted) * (1 - probability).log()
    return total / len(logits)


@pytest.mark.no_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_equals_a_literal_sum_and_torch(smoothing, mixed):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, generator=generator)
    targets = F.one_hot(LABELS, 5).float()
    if mixed:
        targets = 0.7 * targets + 0.3 * targets.roll(1, 0)
    smooth = (1 - smoothing) * targets + smoothing / 5
    found = classification_loss(logits, targets if mixed else LABELS, smoothing, "sigmoid")
    torch.testing.assert_close(found.double(), literal(logits, smooth), rtol=1e-5, atol=1e-6)
    torchs = F.binary_cross_entropy_with_logits(logits, smooth) * 5
    torch.testing.assert_close(found, torchs)


@pytest.mark.no_backend
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_an_example_that_does_not_count_is_left_out(kind):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([4, -100, 2])
    loss = classification_loss(logits, labels, 0.1, kind)
    rest = torch.tensor([0, 2])
    torch.testing.assert_close(loss, classification_loss(logits[rest], labels[rest], 0.1, kind))
    loss.backward()
    assert not logits.grad[1].any() and logits.grad[0].all()
    nothing = classification_loss(logits[:0], labels[:0], 0.0, kind)
    assert nothing.isnan() and nothing.shape == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_model_has_it_and_keeps_its_charge(name, smoothing):
    torch.manual_seed(0)
    bank = {"bank_patch_size": 2} if name == "adatape" else {}
    model = create_model(f"{name}_tiny_patch16_224", **SMALL, **bank, num_classes=5).eval()
    torch.nn.init.normal_(model.head.weight)
    output = model(torch.rand(3, 3, 8, 8))
    charge = model.charge(output)
    assert (charge is None) == (name == "vit")
    wanted = classification_loss(output.logits, LABELS, smoothing, "sigmoid")
    wanted = wanted if charge is None else wanted + charge
    for owner in (model, model.padded()):
        found = owner.loss(output, LABELS, label_smoothing=smoothing, kind="sigmoid")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        softmax = owner.loss(output, LABELS, label_smoothing=smoothing)
        assert softmax == owner.loss(output, LABELS, label_smoothing=smoothing, kind="softmax")
        assert softmax != found


@pytest.mark.no_backend
@pytest.mark.parametrize("kind", [None, 1, "", "focal", ["sigmoid"]])
def test_an_unknown_kind_is_named(kind):
    with refused("kind", "'softmax' or 'sigmoid'"):
        classification_loss(torch.zeros(3, 5), LABELS, 0.0, kind)
