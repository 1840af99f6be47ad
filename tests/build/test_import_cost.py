"""What importing the package brings along."""

import os
import subprocess
import sys


def test_torch_s_compiler_is_not_imported():
    """It takes as long as all the rest of torch, and most programs never use it."""
    script = "import sys, adatape_kernels; print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
