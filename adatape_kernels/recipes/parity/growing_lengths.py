"""The curriculum of a parity run: sequences that grow as they are solved."""

_FIRST_LENGTH = 4
_GROWTH = 1.25
# Sequences grow when a model is right about so many of the last ones, which a mean that forgets a
# tenth at each step tells.
_SOLVED = 0.95
_KEPT = 0.9
# Where the mean begins at a new length: a few good steps are asked for before the next.
_BELOW_SOLVED = 0.8


class GrowingLengths:
    """How long the sequences of each step are.

    They begin with 4 symbols, and become a quarter longer whenever 95 per cent of the last ones
    were told right. A model that does not learn them gets longer ones all the same: the length goes
    up geometrically, and reaches the whole one behind the steps that are given to it.

    Lengths are even until the whole one, so that a read of pairs leaves nothing over.

    Args:
        length: the whole length.
        growing_steps: number of steps behind which all sequences have it; 0 for no growth.
    """

    def __init__(self, length: int, growing_steps: float):
        self.length = length
        self.growing_steps = growing_steps if length > _FIRST_LENGTH else 0
        self._solved_up_to = _FIRST_LENGTH
        self._right = _BELOW_SOLVED

    def at(self, step: int) -> int:
        """Return the length of the sequences of a step."""
        if step >= self.growing_steps:
            return self.length
        share = step / self.growing_steps
        latest = _FIRST_LENGTH * (self.length / _FIRST_LENGTH) ** share
        return min(max(self._solved_up_to, 2 * round(latest / 2)), self.length)

    def learn(self, length: int, right: float) -> None:
        """Take note of the share of a step's sequences, of a length, that a model was right about.

        Args:
            length: what `at` returned for the step.
            right: the share.
        """
        self._right = _KEPT * self._right + (1 - _KEPT) * right
        if self._right > _SOLVED:
            longer = max(length + 2, 2 * round(length * _GROWTH / 2))
            self._solved_up_to = min(longer, self.length)
            self._right = _BELOW_SOLVED
