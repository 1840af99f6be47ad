"""The package `adatape_kernels.benchmarks`, in a clone of the repository.

There its folder benchmarks/ lies beside this package. An installed package holds a copy of that
folder as adatape_kernels/benchmarks/, which Python finds before this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "benchmarks")]
