"""What the commands' exit codes say."""

from adatape_kernels.recipes.interruptions import EXIT_INTERRUPTED

__all__ = ["EXIT_CODES", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_UNREADABLE"]

EXIT_FAILED, EXIT_UNREADABLE = 1, 2
EXIT_CODES = (
    "exit codes: 0 done; 1 a check has failed, or an export differs from its model; 2 unusable "
    "arguments or files, or an error; 130 interrupted"
)
"""The last lines of `--help`."""
