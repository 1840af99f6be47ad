"""AdaTape for PyTorch: Transformers whose input sequence is elastic, with kernels to match."""

__version__ = "0.1.0"

from adatape_kernels import layers, models, ops, scenic
from adatape_kernels._build import warn_of_plain_python
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.ops.compiled_part import FACTS
from adatape_kernels.ops.op import use_backend

__all__ = ["ElasticBatch", "layers", "models", "ops", "scenic", "use_backend"]

warn_of_plain_python(FACTS)
