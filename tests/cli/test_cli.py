import os
import subprocess
import sys

import pytest
import torch

from adatape_kernels import __version__
from adatape_kernels.cli import main


def test_info_names_versions_and_facts_of_the_build(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"adatape-kernels {__version__}" in out
    assert "compiled" in out


def test_an_unknown_backend_gets_one_line(capsys):
    assert main(["verify", "any.npz", "--backend", "fpga"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adatape-kernels: use_backend: ") and error.count("\n") == 1
    assert "expected one of eager, cpp, triton, cuda, got 'fpga'" in error


@pytest.mark.skipif("+cpu" not in torch.__version__, reason="this torch may have CUDA")
def test_an_absent_backend_gets_one_line_that_says_what_is_missing():
    environment = {k: v for k, v in os.environ.items() if k != "ADATAPE_CUDA_HOST"}
    command = [sys.executable, "-m", "adatape_kernels.cli", "verify", "any.npz"]
    result = subprocess.run(
        [*command, "--backend", "cuda"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == (
        "adatape-kernels: use_backend: backend 'cuda' is not available: "
        f"torch {torch.__version__} has no CUDA\n"
    )


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        pytest.param(
            "cuda",
            "got cuda, and torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_an_unusable_device_gets_one_line(capsys, device, words):
    assert main(["verify", "any.npz", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adatape-kernels: device: ") and error.count("\n") == 1
    assert words in error


def test_the_command_stops_quietly_when_its_reader_does():
    command = f"{sys.executable} -m adatape_kernels.cli info | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("adatape-kernels ")
    assert "Traceback" not in result.stderr


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
