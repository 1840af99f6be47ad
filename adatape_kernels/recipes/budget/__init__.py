"""One trained model at many budgets: what a threshold and a longest tape cost and give."""
