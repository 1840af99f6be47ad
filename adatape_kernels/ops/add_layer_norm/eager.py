"""`add_layer_norm` by the reference, on every device and in every dtype."""

from adatape_kernels import reference
from adatape_kernels.ops.implementation import implementation

forward = implementation()(reference.add_layer_norm)
backward = implementation()(reference.add_layer_norm_bwd)
