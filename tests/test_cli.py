import subprocess
import sys

import pytest
import torch

from adatape_kernels import __version__
from adatape_kernels.backend import registered_ops
from adatape_kernels.cli import main


def test_info_names_versions_and_what_serves_each_op(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"adatape-kernels {__version__}" in out
    assert "compiled" in out
    for op in registered_ops():
        line = next(line for line in out.splitlines() if line.split()[:1] == [op])
        assert line.count("*") == 1
    assert "(1) " in out


@pytest.mark.parametrize(
    ("backend", "words"),
    [("fpga", "expected one of eager, cpp, triton, cuda, got 'fpga'"), ("cuda", "not available")],
)
def test_an_unusable_backend_gets_one_line(capsys, backend, words):
    assert main(["verify", "any.npz", "--backend", backend]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adatape-kernels: use_backend: ") and error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "expected cpu or cuda, got 'tpu'"),
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
