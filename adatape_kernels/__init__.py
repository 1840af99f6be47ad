"""AdaTape for PyTorch: Transformers whose input sequence is elastic, with kernels to match."""

from adatape_kernels import _build, halting, layers, models, ops, scenic
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.elastic_examples import ElasticExample
from adatape_kernels.models.model_file import save
from adatape_kernels.models.pretrained import patch, unpatch
from adatape_kernels.ops.compiled_part import FACTS
from adatape_kernels.ops.op import use_backend
from adatape_kernels.recipes.model_loading import load

__all__ = [
    "ElasticBatch",
    "ElasticExample",
    "halting",
    "layers",
    "load",
    "models",
    "ops",
    "patch",
    "save",
    "scenic",
    "unpatch",
    "use_backend",
]

__version__ = _build.VERSION

_build.warn_of_plain_python(FACTS)
