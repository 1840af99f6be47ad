"""What the commands' exit codes say."""

EXIT_FAILED, EXIT_UNREADABLE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = (
    "exit codes: 0 done; 1 a check has failed, or an export differs from its model; 2 unusable "
    "arguments or files, or an error; 130 interrupted"
)
"""The last lines of `--help`."""
