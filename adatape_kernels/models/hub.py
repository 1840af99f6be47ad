"""Models in folders and repositories of the Hugging Face Hub, by huggingface_hub's own mixin.

Where that package is not installed models lack these methods, and `adatape_kernels.save` and
`adatape_kernels.load` are what there is. Nothing is downloaded unless `from_pretrained` is given
the name of a repository.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adatape_kernels.models.model_file import FILE, SavedModel, read, save

if TYPE_CHECKING:  # the methods are seen by type checkers without the package, too
    ModelHubMixin: Any = object
else:
    try:
        from huggingface_hub import ModelHubMixin
    except ImportError:
        ModelHubMixin = None

if TYPE_CHECKING or ModelHubMixin is None:

    class HubModel(SavedModel):
        """A model that can be saved; huggingface_hub is not installed."""

else:

    class HubModel(
        SavedModel,
        ModelHubMixin,
        library_name="adatape-kernels",
        pipeline_tag="image-classification",
        tags=["adatape", "adaptive-computation"],
    ):
        """A model with `from_pretrained`, `save_pretrained` and `push_to_hub`.

        The folder or repository holds model.safetensors, as `adatape_kernels.save` writes it,
        config.json for readers, and a model card.
        """

        def _save_pretrained(self, save_directory: Path) -> None:
            save(self, save_directory / FILE)

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            device: str | torch.device = "cpu",
            dtype: torch.dtype | None = None,
            config: Any = None,
            **where: Any,
        ) -> "HubModel":
            """Load the model; its configuration is that of the file, whatever config.json says."""
            file = Path(model_id) / FILE
            if not Path(model_id).is_dir():
                from huggingface_hub import hf_hub_download

                file = Path(hf_hub_download(repo_id=model_id, filename=FILE, **where))
            description, tensors = read(file)
            if description is None:
                raise ValueError(f"{file}: expected a model's configuration in it, got none")
            model = description.build(tensors, file)
            if not isinstance(model, cls):
                raise ValueError(
                    f"{file}: expected a model of {cls.__name__}, got {type(model).__name__}"
                )
            return model.to(device=device, dtype=dtype)
