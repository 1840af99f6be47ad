"""RandAugment: each training image passes a few operations that are drawn for it; from kornia."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Generator, Tensor

MOST_MAGNITUDE = 29
"""The largest magnitude on kornia's scale, of which 15 is half of each operation's range."""

# kornia's names of operations, each with its range of magnitudes.
_POLICY = (
    ("auto_contrast", 0, 1),
    ("equalize", 0, 1),
    ("invert", 0, 1),
    ("rotate", -30.0, 30.0),
    ("posterize", 4.0, 8.0),
    ("solarize", 0.0, 1.0),
    ("solarize_add", 0.0, 0.43),
    ("color", 0.1, 1.9),
    ("contrast", 0.1, 1.9),
    ("brightness", 0.1, 1.9),
    ("sharpness", 0.1, 1.9),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("translate_x", -0.1, 0.1),
    ("translate_y", -0.1, 0.1),
)


def require_kornia(name: str) -> None:
    """Raise RuntimeError where kornia, which the option `name` needs, is not installed."""
    if find_spec("kornia") is None:
        raise RuntimeError(
            f"{name}: expected kornia to be installed (pip install 'adatape-kernels[augment]')"
        )


class RandAugment:
    """Lets each image pass some of kornia's operations, all of one magnitude.

    The operations are those of kornia's default policy: contrast that is spread or equalised,
    inverted, solarised and posterised colours, other brightness, contrast, saturation and
    sharpness, and images that are turned, sheared or moved. kornia's own class draws operations for
    a whole batch; here they are drawn for each image.

    Args:
        operations: number of operations that an image passes, drawn with replacement.
        magnitude: 1 to 29, how strong they are.

    Source: Cubuk et al., RandAugment.
    """

    def __init__(self, operations: int, magnitude: int):
        from kornia.augmentation import auto

        self.operations = operations
        self._policy = [auto.RandAugment(1, magnitude, policy=[[part]]) for part in _POLICY]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Return changed images (batch, 1 or 3, height, width) in 0 to 1; the shape stays."""
        channels = images.shape[1]
        # Saturation is that of red, green and blue; a grey image has none, and stays grey.
        result = images.expand(-1, 3, -1, -1).clone()
        with torch.no_grad(), _seeded(images.device, generator):
            for _ in range(self.operations):
                drawn = torch.randint(len(self._policy), (len(images),), generator=generator)
                for number in drawn.unique().tolist():
                    chosen = (drawn == number).nonzero().squeeze(1).to(images.device)
                    result[chosen] = self._policy[number](result[chosen]).to(result.dtype)
        return result.clamp_(0, 1)[:, :channels]


@contextlib.contextmanager
def _seeded(device: torch.device, generator: Generator) -> Iterator[None]:
    """Let torch's default generators begin with a seed of `generator`, then be as they were.

    kornia draws from them, and what is drawn must not depend on what was drawn before, nor change
    what is drawn later.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator))
    of_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if of_gpu else []):
        torch.random.default_generator.manual_seed(seed)
        if of_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
