"""`python -m adatape_kernels` is the `adatape-kernels` command."""

import sys

from adatape_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
