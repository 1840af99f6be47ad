"""Drop-in modules over `ElasticBatch`: attention, feed-forwards, the encoder and the tape reader.

They also take a plain tensor, a padded one with its mask, or a jagged one, and return the same.

Parameters are named as in the torch modules that these replace. `from_torch` makes a layer that
computes what one of torch computes; a state dict alone does not say with which activation, epsilon
and order of norms it is to be used.

The ops have no dropout inside. A layer that trains with dropout on attention weights or on
activations therefore computes that product in plain torch; dropout on a branch's output is applied
to the result of the op.
"""

from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.encoder import ElasticEncoder
from adatape_kernels.layers.encoder_layer import ElasticEncoderLayer
from adatape_kernels.layers.feed_forward import DualFFN
from adatape_kernels.layers.halting_encoder import AViTEncoder, Halted, UniversalEncoder
from adatape_kernels.layers.halting_units import FeatureGate, MeanHaltingUnit
from adatape_kernels.layers.reader import QueryType, TapeReader
from adatape_kernels.layers.self_attention import ElasticAttention
from adatape_kernels.layers.torch_modules import NORM_EPS

__all__ = [
    "NORM_EPS",
    "AViTEncoder",
    "DualFFN",
    "ElasticAttention",
    "ElasticEncoder",
    "ElasticEncoderLayer",
    "ElasticModule",
    "FeatureGate",
    "Halted",
    "MeanHaltingUnit",
    "QueryType",
    "TapeReader",
    "UniversalEncoder",
]
