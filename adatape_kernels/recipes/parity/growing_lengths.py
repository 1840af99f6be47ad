"""The curriculum of a parity run: sequences that grow as they are solved, and shrink as not."""

_FIRST_LENGTH = 8
_GROWTH = 1.25
# Sequences grow when a model is right about so many of the last ones, which a mean that forgets a
# tenth at each step tells, and shrink when it is right about so few: one that guesses is right
# about half.
_SOLVED = 0.95
_LOST = 0.6
_KEPT = 0.9
# Where the mean begins at another length: a few good steps are asked for before the next.
_BELOW_SOLVED = 0.8


class GrowingLengths:
    """How long the longest sequences of each step are.

    They begin with 8 symbols, and become a quarter longer whenever 95 per cent of the last ones
    were told right. Where a model is right about fewer than 60 per cent, they become as long as
    they were before: at a high learning rate a model can lose what it had learned, and does not
    find it again from long sequences. A model that does not get there has the whole length all the
    same, behind the steps that are given to it.

    Lengths are even until the whole one, so that a read of pairs leaves nothing over.

    Args:
        length: the whole length.
        growing_steps: number of steps behind which sequences have it; 0 for no growth.
    """

    def __init__(self, length: int, growing_steps: float):
        self.length = length
        self.growing_steps = growing_steps
        self._lengths = [min(_FIRST_LENGTH, length)]
        while self._lengths[-1] < length:
            longer = 2 * round(self._lengths[-1] * _GROWTH / 2)
            self._lengths.append(min(longer, length))
        self._reached = 0
        self._right = _BELOW_SOLVED

    def decides(self, step: int) -> bool:
        """Return whether what a model is right about in a step decides later lengths."""
        return step < self.growing_steps and len(self._lengths) > 1

    def at(self, step: int) -> int:
        """Return the length of the longest sequences of a step."""
        return self._lengths[self._reached] if step < self.growing_steps else self.length

    def learn(self, right: float) -> None:
        """Take note of the share of a step's sequences that a model was right about."""
        self._right = _KEPT * self._right + (1 - _KEPT) * right
        if self._right > _SOLVED:
            self._move(1)
        elif self._right < _LOST:
            self._move(-1)

    def _move(self, by: int) -> None:
        """Go on to the next length, or back to the one before, where there is one."""
        reached = min(max(self._reached + by, 0), len(self._lengths) - 1)
        if reached != self._reached:
            self._reached, self._right = reached, _BELOW_SOLVED
