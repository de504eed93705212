"""Layouts in which the hidden states pass from stage to stage, once in every chunk, as numbers.

Takes the layouts that layers may have; gives a number for every choice of one a chunk.  Knows nothing of what a
change of layout costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron.cost.strategies import Ints

ANY = -1
"""What comes before the embedding: there is no layout to change from."""

MOST = 128
"""Codes for which chains are solved as they are: their tables have a row and a column for each."""


@dataclass(frozen=True)
class Borders:
    """``layouts``: those that layers may have, ascending; ``chunks``: of a stage.

    ANY alone as layouts leaves out what changes at borders cost: what then comes out is a bound.
    The code of a border has a digit a chunk, the first chunk's the highest: the position of its layout among these.
    """

    layouts: Ints
    chunks: int

    @property
    def are_free(self) -> bool:
        """Whether changes of layout at borders are left out."""
        return bool(self.layouts[0] == ANY)

    @property
    def key(self) -> tuple[int, ...]:
        """What tells them from others."""
        return (self.chunks, *self.layouts.tolist())

    def __len__(self) -> int:
        """How many codes there are."""
        return int(len(self.layouts) ** self.chunks)

    def after(self, code: Ints, layout: Ints) -> Ints:
        """The codes with one more digit."""
        digit = 0 if self.are_free else np.searchsorted(self.layouts, layout)
        appended: Ints = code * len(self.layouts) + digit
        return appended

    def passed(self, codes: Ints) -> Ints:
        """The layouts [code, chunk]."""
        digits = np.arange(self.chunks)[::-1]
        layouts: Ints = self.layouts[codes[:, None] // len(self.layouts) ** digits % len(self.layouts)]
        return layouts

    @property
    def first(self) -> Ints:
        """[entry, chunk]: how hidden states may enter the first stage, where the embedding begins the first chunk."""
        entries = self.passed(np.arange(len(self) // len(self.layouts)))
        entries[:, 0] = ANY
        return entries

    def meeting(self, entry: Ints, last: Ints) -> Ints:
        """Which of the codes ``last``, of the last stage, come in as ``entry`` to the first stage's later chunks."""
        return np.flatnonzero((self.passed(last)[:, :-1] == entry[1:]).all(axis=1))
