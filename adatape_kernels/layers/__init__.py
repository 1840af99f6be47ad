"""Drop-in modules over `ElasticBatch`: attention, feed-forwards, the encoder and the tape reader.

Parameters are named as in the torch modules that these replace, so that a state dict of
`torch.nn.TransformerEncoderLayer` (norm_first=True, GELU in its tanh form) loads.

The ops have no dropout inside. A layer that trains with dropout on attention weights or on
activations therefore computes that product with the eager reference; dropout on a branch's output
is applied to the result of the op.
"""

from adatape_kernels.layers.encoder import ElasticEncoder, ElasticEncoderLayer
from adatape_kernels.layers.feed_forward import DualFFN
from adatape_kernels.layers.reader import QueryType, TapeReader
from adatape_kernels.layers.self_attention import ElasticAttention
from adatape_kernels.layers.torch_modules import NORM_EPS

__all__ = [
    "NORM_EPS",
    "DualFFN",
    "ElasticAttention",
    "ElasticEncoder",
    "ElasticEncoderLayer",
    "QueryType",
    "TapeReader",
]
