"""What every benchmark shares: cases, clocks, the machine's ceilings, rows, and the command."""
