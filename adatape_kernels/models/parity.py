"""AdaTape on the parity task: one token for the whole sequence, a bank token for each element."""

from dataclasses import dataclass

from torch import Tensor, nn

from adatape_kernels.models.adatape import AdaTape, AdaTapeConfig


@dataclass(frozen=True)
class AdaTapeParityConfig(AdaTapeConfig):
    """An AdaTapeConfig with the sequence's length."""

    seq_len: int = 40
    element_dim: int = 3
    """Features of an element, a one-hot symbol."""

    def __post_init__(self) -> None:
        """Check that the bank fills at least one tape token."""
        super().__post_init__()
        if self.bank == "input" and self.seq_len < self.topk:
            raise ValueError(f"topk: expected at most seq_len = {self.seq_len}, got {self.topk}")


class AdaTapeParity(AdaTape):
    """A classifier of (batch, seq_len, element_dim) sequences that the tape shows in detail."""

    bank_repeats_rows = True

    def __init__(self, config: AdaTapeParityConfig):
        super().__init__(config)
        self.config: AdaTapeParityConfig = config
        self.sequence_embed = nn.Linear(config.seq_len * config.element_dim, config.dim)
        if config.bank == "input":
            self.pre_bank = nn.Linear(config.element_dim, config.dim)

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flatten each sequence into one token, and make each element a bank token.

        Raises:
            ValueError: the sequences' shape is not the configured one.
        """
        shape = (self.config.seq_len, self.config.element_dim)
        if inputs.dim() != 3 or inputs.shape[1:] != shape:
            raise ValueError(f"inputs: expected (batch, {shape}), got {tuple(inputs.shape)}")
        tokens = self.with_class_token(self.sequence_embed(inputs.flatten(1)).unsqueeze(1))
        if self.config.bank == "learn":
            return tokens, None
        # One-hot elements pick a row of the weights and add zeros to it, which rounds nothing:
        # equal elements give bank rows of equal bits, wherever they stand.
        return tokens, self.pre_bank(inputs)
