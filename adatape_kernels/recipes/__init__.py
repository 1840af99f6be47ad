"""What a user runs: checking golden files, and training and measuring a model."""
