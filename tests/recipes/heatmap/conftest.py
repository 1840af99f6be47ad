"""What the tests of `heatmap` share: runs of the digits."""

import pytest

from adatape_kernels.cli import main

TRAIN = ["train", "--data", "digits", "--epochs", "1", "--limit", "48", "--seed", "3", "--depth"]
TRAIN += ["1", "--dim", "16", "--heads", "2", "--ffn", "16"]


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """A run that reads patches, one that reads learned tokens, and a ViT that reads nothing."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "input": [],
        "learn": ["--bank", "learn", "--bank-size", "30"],
        "vit": ["--num-tape-tokens", "0"],
    }
    for name, own in options.items():
        assert main([*TRAIN, *own, "--out", str(folder / name)]) == 0
    return folder
