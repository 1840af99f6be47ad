"""Models whose examples or rows halt in buffers that keep their sizes, for CUDA graphs.

The results are those of rows that leave. Triton's launchers on meta tensors, which have no values,
show that nothing is copied to the host.
"""

import pytest
import torch
from checks import refused
from test_capacity_mode import TritonLaunchers
from test_halting_models import UNIVERSAL, avit, compare, images, uvit

import adatape_kernels as ak
from adatape_kernels import models
from adatape_kernels.ops import triton_runtime

SIZES = {"image_size": 32, "depth": 3, "num_classes": 10, "dim": 32, "num_heads": 2, "ffn_dim": 64}
MODELS = {
    "uvit": ("uvit_tiny_patch16_224", {}),
    "uvit by row": ("uvit_tiny_patch16_224", {"act_level": "row"}),
    "uvit rows leave": ("uvit_tiny_patch16_224", {"act_level": "row", "leave": "row"}),
    "u2t": ("u2t_tiny_patch16_224", {"act_type": "accumulated", "force_halt": True}),
    "avit": ("avit_tiny_patch16_224", {}),
    "avit class token": ("avit_tiny_patch16_224", {"keep_class_token": True}),
    "avit pooled": ("avit_tiny_patch16_224", {"pooling": "mean", "num_registers": 2}),
}

KERNELS = (
    "_compact_rows_prefix",
    "_compact_rows_copy",
    "_compact_rows_bwd",
    "_accumulate_rows_fwd",
    "_accumulate_rows_bwd",
    "_elastic_attention_fwd",
    "_elastic_attention_bwd",
)


class Static(torch.nn.Module):
    """A model that is always called with `static=True`, on the same parameters."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, given):
        return self.model(given, static=True)

    def named_parameters(self, *arguments, **options):
        return self.model.named_parameters(*arguments, **options)


REGIMES = [
    *((kind, "random") for kind in UNIVERSAL),
    ("shared", "together"),
    ("rows leave", "first"),
]


@pytest.mark.parametrize(("kind", "regime"), REGIMES)
def test_static_equals_leaving(kind, regime):
    model = uvit(regime, **UNIVERSAL[kind])
    compare(model, Static(model), images())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("regime", ["random", "first"])
def test_static_tokens_equal_tokens_that_leave(regime, keep):
    model = avit(regime, keep_class_token=keep)
    compare(model, Static(model), images())


def test_images_of_many_sizes_keep_their_buffers():
    model = avit("random")
    given = [torch.randn(1, *size, dtype=torch.double) for size in ((16, 16), (8, 24), (8, 8))]
    leaves, stays = model(given), model(given, static=True)
    torch.testing.assert_close(leaves.logits, stays.logits, rtol=1e-10, atol=1e-10)
    assert torch.equal(leaves.halted.steps, stays.halted.steps)
    assert set(stays.halted.rows_per_step) == {5 + 4 + 2}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_wrong_is_one_line_and_an_empty_batch_works(name):
    model = models.create_model(MODELS[name][0], **SIZES, **MODELS[name][1])
    assert len(model(torch.zeros(0, 3, 32, 32), static=True)) == 0
    with refused("static", "True or False", error=TypeError):
        model(torch.zeros(1, 3, 32, 32), static=1)


@pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_no_value_reaches_the_host(name):
    model_name, options = MODELS[name]
    with torch.device("meta"):
        model = models.create_model(model_name, **SIZES, **options).train()
        given, labels = torch.empty(4, 3, 32, 32), torch.empty(4, dtype=torch.int64)
        with triton_runtime.recording() as launches, TritonLaunchers():
            model.loss(model(given, static=True), labels).backward()
        names = [launch.kernel.__name__ for launch in launches]
        for kernel in KERNELS:
            assert any(name.startswith(kernel) for name in names), kernel
        with triton_runtime.recording(), TritonLaunchers():
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                model(given)


def test_unused_rows_hold_no_gradient_and_no_poison():
    model = avit("first")
    given = images(3)
    output = model(given, static=True)
    assert output.halted.rows_per_step == (15, 15, 15, 15)
    assert output.halted.steps.eq(1).all()
    model.loss(output, torch.tensor([0, 1, 2])).backward()
    assert given.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_model_that_halts_nothing_has_nothing_static():
    model = models.create_model("uvit_tiny_patch16_224", **SIZES, act_type="none")
    given = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(given, static=True).logits, model(given).logits)
    assert isinstance(model, ak.models.HaltingClassifier)


def test_devices_without_autocast_have_halting_units_and_other_grids():
    with torch.device("meta"):
        model = models.create_model("uvit_tiny_patch16_224", **SIZES, act_level="row")
        model.position = torch.nn.Parameter(torch.empty(1, 5, 32))
        tokens = model.embed_elastic([torch.empty(3, 16, 48), torch.empty(3, 32, 32)]).tokens
        assert tokens.data.shape == (4 + 5, 32)
        state = model.encoder.halting.start(tokens)
        assert model.encoder.unit(state).shape == (9,)
