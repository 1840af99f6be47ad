"""The handwritten digits that scikit-learn carries."""

import torch

from adatape_kernels.data.image_set import ImageSet

TEST_IMAGES = 360


def digits(seed: int = 0) -> ImageSet:
    """Load 1,797 images (1, 8, 8) of handwritten digits, float32 in 0 to 1.

    Args:
        seed: decides which 360 images are for the test, drawn with equal shares of every class.

    Raises:
        RuntimeError: scikit-learn is not installed.

    Source: UCI, Optical Recognition of Handwritten Digits; sklearn.datasets.load_digits.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise RuntimeError(
            "digits: expected scikit-learn to be installed (pip install 'adatape-kernels[demo]')"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, random_state=seed, stratify=bunch.target
    )
    names = tuple(str(digit) for digit in range(10))
    return ImageSet(images[train], labels[train], images[test], labels[test], names)
