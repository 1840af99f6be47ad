"""Tables, plots and comparisons that are made of recorded rows."""
