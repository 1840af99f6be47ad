"""What a model does within one pair of limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetResult:
    """What a model does within limits."""

    run: str
    """Which run the model is from."""
    halt_threshold: float
    num_tape_tokens: int
    accuracy: float
    """Share of the test images that are classified right."""
    mean_tape_tokens: float
    mean_rows: float
    """Rows that a layer behind every read computes for an image, on average."""
    flops: float
    """Floating-point operations of the products of a forward pass, an image."""
    images_per_second: float
    """By the median time of a batch."""
    images_per_second_p20_p80: tuple[float, float]
    """By the 80th and the 20th percentile of the times."""
