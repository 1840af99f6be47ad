"""Pretrained ViTs of other packages, none of which has to be installed.

AdaTape models are made of them, or they are patched to compute by our ops.
"""

from adatape_kernels.models.pretrained.patching import patch, unpatch
from adatape_kernels.models.pretrained.timm_vit import from_timm
from adatape_kernels.models.pretrained.torchvision_vit import from_torchvision

__all__ = ["from_timm", "from_torchvision", "patch", "unpatch"]
