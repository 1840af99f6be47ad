"""AdaTape models from pretrained ViTs of other packages, neither of which has to be installed."""

from adatape_kernels.models.pretrained.timm_vit import from_timm
from adatape_kernels.models.pretrained.torchvision_vit import from_torchvision

__all__ = ["from_timm", "from_torchvision"]
