"""A small VisionTransformer of timm, which the tests of patching share."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(cls=VisionTransformer, **options):
    model = cls(**{**SIZES, "num_classes": 5, "dynamic_img_size": True, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
