"""A file with a pretrained ViT of timm or torchvision, which `train` can begin with."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AdaTapeViTOptions,
    from_timm,
    from_torchvision,
)
from adatape_kernels.models.model_file import read
from adatape_kernels.op_types import Activation
from adatape_kernels.pooling import Pooling

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BYTES = 1 << 20
# The names of the head's weight in timm, and in torchvision's present and early files.
_HEADS = ("head.weight", "heads.head.weight", "heads.weight")


@dataclass(frozen=True)
class SourceFacts:
    """What a source decides about the model that no option of `train` does."""

    sha256: str
    """The hash of its file."""
    pooling: Pooling
    num_registers: int
    norm_eps: float
    norm_after_pooling: bool
    pre_norm: bool

    def __post_init__(self) -> None:
        """Check the hash; the model's configuration checks its own fields."""
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"source: expected a SHA-256, got {shown(self.sha256)}")

    @classmethod
    def of_saved(cls, saved: object) -> "SourceFacts":
        """Return facts that a checkpoint holds. Raises ValueError where they are none."""
        names = set(cls.__dataclass_fields__)
        if not isinstance(saved, Mapping) or set(saved) != names:
            raise ValueError(
                f"source: expected {', '.join(cls.__dataclass_fields__)}, got {shown(saved)}"
            )
        return cls(**saved)

    def fields(self) -> AdaTapeViTOptions:
        """Return them as fields of AdaTapeViTConfig."""
        return {
            "pooling": self.pooling,
            "query": "token" if self.pooling == "token" else "gap",
            "num_registers": self.num_registers,
            "norm_eps": self.norm_eps,
            "norm_after_pooling": self.norm_after_pooling,
            "pre_norm": self.pre_norm,
        }


@dataclass(frozen=True)
class SourceFile:
    """A pretrained ViT, read from its file."""

    path: Path
    facts: SourceFacts
    config: AdaTapeViTConfig
    """That of the ViT, which reads nothing."""
    num_classes: int | None
    """Number of classes of its head; None where it has none."""
    tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def read(
        cls, path: Path, *, heads: int | None = None, activation: Activation | None = None
    ) -> "SourceFile":
        """Read a safetensors file.

        Args:
            path: the file.
            heads: number of attention heads, which tensors do not tell.
            activation: that of the feed-forward; None for the exact GELU, as in timm and
                torchvision.

        Raises:
            ValueError: the number of heads is missing, or the file holds no ViT that can be
                computed here; the error names the file.
            OSError: the file cannot be read.
        """
        name = printable(path)
        if not path.is_file():
            raise ValueError(f"source: expected a safetensors file, got {name}, which is none")
        description, found = read(path)
        if description is not None:
            raise ValueError(
                f"source: expected a ViT of timm or torchvision, got {name}, "
                "which holds a model of adatape-kernels"
            )
        if heads is None:
            raise ValueError(
                "heads: expected the number of the source's attention heads, which its file does "
                "not tell, got none"
            )
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in found.items()}
        plain: dict[str, Any] = {"num_heads": heads, "bank": "learn", "read_layers": ()}
        if activation is not None:
            plain["activation"] = activation
        try:
            config = _convert(tensors, {**plain, "num_classes": 1}, new_head=True).config
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('model: ')}") from None
        head = next((tensors[n] for n in _HEADS if n in tensors), None)
        facts = {n: getattr(config, n) for n in SourceFacts.__dataclass_fields__ if n != "sha256"}
        return cls(
            path,
            SourceFacts(sha256_of(path), **facts),
            config,
            None if head is None else len(head),
            tensors,
        )

    def options(self) -> dict[str, Any]:
        """Return what the source decides, as options of `train`."""
        c = self.config
        return {
            "image_size": c.image_size,
            "patch": c.patch_size,
            "dim": c.dim,
            "depth": c.depth,
            "heads": c.num_heads,
            "ffn": c.ffn_dim,
            "activation": c.activation,
        }

    def model(self, config: AdaTapeViTConfig) -> AdaTapeViT:
        """Return the ViT as a model of this configuration, with a new head for other classes.

        Raises:
            ValueError: the configuration contradicts the source; the error names the field.
        """
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return _convert(self.tensors, fields, new_head=config.num_classes != self.num_classes)


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_BYTES):
            digest.update(part)
    return digest.hexdigest()


def timm_tensors(model: AdaTapeViT) -> dict[str, Tensor]:
    """Return the parameters of a ViT that reads nothing by timm's names, without gradients.

    Args:
        model: one without reads, registers, a class token and a norm before its layers, as `train`
            makes where there is no source.
    """
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    theirs = {
        "pos_embed": ours.pop("position"),
        **{f"patch_embed.proj.{leaf}": ours.pop(f"patch_embed.{leaf}") for leaf in _LEAVES},
        **{f"head.{leaf}": ours.pop(f"head.{leaf}") for leaf in _LEAVES},
    }
    for name, tensor in ours.items():
        for pattern, replacement in _TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor
    return theirs


_LEAVES = ("weight", "bias")
_TIMM_NAMES = (
    (r"^encoder\.norm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.in_proj_", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
)


def _convert(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], *, new_head: bool
) -> AdaTapeViT:
    """Return the AdaTape model of a state dict. Raises ValueError."""
    of_torchvision = "class_token" in tensors or any(n.startswith("conv_proj.") for n in tensors)
    convert: Any = from_torchvision if of_torchvision else from_timm
    return convert(tensors, new_head=new_head, **options)
