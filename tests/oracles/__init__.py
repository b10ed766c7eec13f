"""Equations as loops over scalars: a second transcription of the papers; numbers to draw."""

import numpy as np


class Scripted:
    """Stands in for a numpy generator: its numbers are a list of shares in [0, 1)."""

    def __init__(self, *shares):
        self.shares = list(shares)

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self.shares.pop(0)

    def random(self, count=None):
        return np.array([self.uniform() for _ in range(count)]) if count else self.uniform()

    def integers(self, *ends):
        low, high = (0, *ends)[-2:]
        return low + int(self.uniform() * (high - low))

    def choice(self, values):
        return values[self.integers(len(values))]

    def permutation(self, count):
        return range(count)[::-1]
