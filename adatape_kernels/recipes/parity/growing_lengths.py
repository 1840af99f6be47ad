"""The curriculum of a parity run: sequences that grow as they are solved."""

_FIRST_LENGTH = 8
_GROWTH = 1.25
# Sequences grow when a model is right about so many of the last ones, which a mean that forgets a
# tenth at each step tells.
_SOLVED = 0.95
_KEPT = 0.9
# Where the mean begins at a new length: a few good steps are asked for before the next.
_BELOW_SOLVED = 0.8


class GrowingLengths:
    """How long the longest sequences of each step are.

    They begin with 8 symbols, and become a quarter longer whenever 95 per cent of the last ones
    were told right. A model that does not get there has the whole length all the same, behind the
    steps that are given to it.

    Lengths are even until the whole one, so that a read of pairs leaves nothing over.

    Args:
        length: the whole length.
        growing_steps: number of steps behind which sequences have it; 0 for no growth.
    """

    def __init__(self, length: int, growing_steps: float):
        self.length = length
        self.growing_steps = growing_steps
        self._solved_up_to = min(_FIRST_LENGTH, length)
        self._right = _BELOW_SOLVED

    def at(self, step: int) -> int:
        """Return the length of the longest sequences of a step."""
        return self._solved_up_to if step < self.growing_steps else self.length

    def learn(self, right: float) -> None:
        """Take note of the share of a step's sequences that a model was right about."""
        self._right = _KEPT * self._right + (1 - _KEPT) * right
        if self._right > _SOLVED:
            longer = 2 * round(self._solved_up_to * _GROWTH / 2)
            self._solved_up_to = min(longer, self.length)
            self._right = _BELOW_SOLVED
