"""How long ranks wait for one another: a simulation, what a step costs, and recorded lengths."""
