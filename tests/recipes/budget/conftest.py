"""What the tests of `budget` share: a run of the digits."""

import pytest

from adatape_kernels.cli import main


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget") / "run"
    options = ["--epochs", "1", "--limit", "48", "--depth", "1", "--dim", "16", "--heads", "2"]
    options += ["--ffn", "16", "--seed", "3"]
    assert main(["train", "--data", "digits", *options, "--out", str(folder)]) == 0
    return folder
