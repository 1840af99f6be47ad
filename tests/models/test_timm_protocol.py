"""`TimmAdaTape` and `PonderLoss`, which do not need timm."""

import copy
import doctest
import pickle

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, refused
from torch import nn

import adatape_kernels as ak
from adatape_kernels.models.timm_protocol import PonderLoss, TimmAdaTape

SIZES = {"image_size": 16, "dim": 24, "num_heads": 2, "ffn_dim": 32, "depth": 2, "topk": 2}
IMAGES, LABELS = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 4])


def model_of(drop_rate=0.0, **options):
    adatape = ak.models.adatape_vit("Ti/8", num_classes=5, **{**SIZES, **options})
    nn.init.normal_(adatape.head.weight)
    return TimmAdaTape(adatape, drop_rate=drop_rate)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "mean", "query": "gap", "num_registers": 1},
        {"norm_after_pooling": True},
        {"bank": "learn", "bank_size": 20, "read_layers": (0, 1)},
        {"read_layers": ()},
    ],
    ids=str,
)
def test_it_computes_what_the_model_does(options):
    model = model_of(**options)
    expected = model.adatape(IMAGES)
    assert_close(model(IMAGES), expected.logits, 1e-6)
    assert model.last_output.tape_lens.tolist() == expected.tape_lens.tolist()
    assert_close(model.last_output.ponder, expected.ponder, 1e-6)
    features = model.forward_features(IMAGES)
    assert (
        features.lens.tolist()
        == model.adatape.encoder(
            ak.ElasticBatch.from_padded(model.adatape.embed(IMAGES)[0]),
            model.adatape.embed(IMAGES)[1],
        )[0].lens.tolist()
    )
    assert_close(model.forward_head(features), expected.logits, 1e-6)
    hidden = model.forward_head(features, pre_logits=True)
    head = model.get_classifier()
    assert_close(F.linear(hidden, head.weight, head.bias), expected.logits, 1e-6)
    names = dict(model.named_parameters())
    assert {name for name in model.no_weight_decay() if name in names} >= {"adatape.position"}


def test_images_of_many_sizes():
    model = model_of().train()
    images = [torch.randn(3, 16, 32), torch.randn(3, 8, 8), torch.randn(3, 24, 16)]
    expected = model.adatape(images)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert_close(model(images), expected.logits, 1e-6)
        assert model.last_output.tape_lens.tolist() == expected.tape_lens.tolist()


@pytest.mark.parametrize("norm_after_pooling", [False, True])
def test_a_new_head(norm_after_pooling):
    model = model_of(norm_after_pooling=norm_after_pooling).train()
    hidden = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_close(model(IMAGES), hidden, 1e-6)
    model.reset_classifier(7, global_pool="token")
    assert model(IMAGES).shape == (4, 7) and (model(IMAGES) == 0).all()
    assert_close(model.forward_head(model.forward_features(IMAGES), True), hidden, 1e-6)
    again = ak.models.AdaTapeViT(model.adatape.config)  # which has learned of the number
    again.load_state_dict(model.adatape.state_dict())
    with refused("global_pool", "'token'", "got 'avg'"):
        model.reset_classifier(7, "avg")
    with refused("num_classes", "got -1"):
        model.reset_classifier(-1)


def test_the_loss_is_the_model_s():
    model = model_of(ponder_weight=0.5)
    criterion = PonderLoss(model, nn.CrossEntropyLoss(label_smoothing=0.1))
    with refused("output", "no images", "got (4, 5)"):
        criterion(torch.zeros(4, 5), LABELS)
    expected = model.adatape.loss(model.adatape(IMAGES), LABELS, label_smoothing=0.1)
    loss = criterion(model(IMAGES), LABELS)
    assert_close(loss, expected, 1e-6)
    loss.backward()
    assert list(criterion.parameters()) == [] and list(criterion.state_dict()) == []
    with refused("output", "4 images", "got (3, 5)"):
        criterion(torch.zeros(3, 5), LABELS[:3])
    for wrong in (model.adatape, nn.Linear(2, 2)):
        with refused("model", error=TypeError):
            PonderLoss(wrong, criterion)
    with refused("criterion", error=TypeError):
        PonderLoss(model, None)


def test_checkpointing_changes_no_gradient():
    model, found = model_of(stochastic_depth=0.3, read_layers=(0, 1)).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(IMAGES).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-5)


def test_copies_leave_the_last_output_behind():
    model = model_of()
    logits = model(IMAGES)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.last_output is None
        assert_close(copied(IMAGES), logits, 1e-6)
    assert model.last_output.logits is logits


def test_the_head_s_features_are_dropped_in_training():
    model = model_of(drop_rate=0.5)
    model.train()
    hidden = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert 0.2 < (hidden == 0).float().mean() < 0.8
    assert (model.eval().forward_head(model.forward_features(IMAGES), True) != 0).all()


def test_a_compiled_model_keeps_its_last_output(fresh_compiler):
    model = model_of()
    criterion = PonderLoss(model, nn.CrossEntropyLoss())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(
        criterion(compiled(IMAGES), LABELS), model.adatape.loss(model.adatape(IMAGES), LABELS), 1e-5
    )


def test_wrong_arguments_are_named():
    with refused("adatape", error=TypeError):
        TimmAdaTape(nn.Linear(2, 2))
    with refused("drop_rate", "got 2"):
        model_of(drop_rate=2)
    with refused("x", "ElasticBatch", error=TypeError):
        model_of().forward_head(torch.zeros(2, 3, 24))


@pytest.mark.parametrize("public", [TimmAdaTape, PonderLoss])
def test_examples(public):
    for test in doctest.DocTestFinder(recurse=False).find(public, public.__name__, globs={}):
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0
