"""Images of many sizes beside timm's own models, positions and NaFlex batches."""

import pytest
import torch
from checks import assert_close, assert_same_bits

from adatape_kernels.models import adatape_vit, from_timm

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify
from timm.models.vision_transformer import VisionTransformer

SIZES = ((32, 32), (48, 16), (8, 56), (40, 40))
KINDS = {
    "class token": {},
    "registers, positions of patches alone": {"reg_tokens": 3, "no_embed_class": True},
    "mean": {"global_pool": "avg", "class_token": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_equals_its_source_on_every_size(kind):
    source = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=5,
        dynamic_img_size=True,
        **KINDS[kind],
    )
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = source.double().eval()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    expected = torch.cat([source(image[None]) for image in images])
    assert_close(from_timm(source, halt_threshold=0.0)(images).logits, expected, 1e-6)


def test_a_batch_of_timm_s_collator():
    model = adatape_vit("Ti/8", image_size=32, dim=24, depth=1, num_classes=5).eval()
    torch.nn.init.normal_(model.head.weight)
    images = [torch.randn(3, *size) for size in SIZES]
    for flat in (True, False):
        cut = Patchify(8, flatten_patches=flat)
        batch, _ = NaFlexCollator()([(cut(image), 0) for image in images])
        assert_same_bits(model(batch).logits, model(images).logits)
