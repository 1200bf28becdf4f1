# SPDX-License-Identifier: Apache-2.0
"""The groups of layers of a model, what each keeps of a prefix, and which prefixes all of them can
serve.

A stored prefix is all of its groups at one position, or nothing. Layers with full attention need
the rows of all tokens; with a window or in chunks, those of the latest ones; a recurrent layer
needs its state after exactly that many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from portakv.errors import InvalidTerms


class Group(NamedTuple):
    """A group of layers whose blocks the engine hands out together.

    Attributes:
        block_size: the tokens of one of its blocks.
        window: the latest tokens whose rows the engine keeps; None: those of all tokens. The engine
            gives up blocks before the window while a request runs, without a word.
        chunk: tokens attend to none before the chunk of so many tokens that they are in; None: to
            all. The engine gives up blocks of earlier chunks in the same way.
        states: a block is no rows, but the state of recurrent layers after its last token.
            ``"every"``: the engine keeps the states at the ends of all blocks that a step computes;
            ``"last"``: only that after the last token of the step, if a block ends there. Others
            have no block, or one that is written again. ``"told"``: the engine says in each step
            which blocks have states. None: a block is rows.
    """

    block_size: int
    window: int | None = None
    chunk: int | None = None
    states: Literal["every", "last", "told"] | None = None

    @property
    def is_whole(self) -> bool:
        """Return whether later tokens need the rows of all earlier ones."""
        return self.window is None and self.chunk is None and self.states is None

    def first_needed(self, tokens: int) -> int:
        """Return the first token whose rows, or state, those after ``tokens`` tokens need.

        ``tokens``, if they need none: such as at the end of a chunk.
        """
        if self.states is not None:
            return max(0, tokens - 1)
        if self.window is not None:
            return max(0, tokens - self.window + 1)
        return 0 if self.chunk is None else tokens // self.chunk * self.chunk

    def check(self, block_size: int) -> None:
        """Raise `InvalidTerms` if stored blocks of a size do not fit the blocks of the group."""
        own = self.block_size
        if block_size < 1 or (block_size % own and (own % block_size or self.states)):
            kind = "a multiple" if self.states else "a multiple or a divisor"
            raise InvalidTerms(
                f"Expected stored blocks of {kind} of {own} tokens, the engine's block size, got "
                f"{block_size}. Pass another block_size."
            )
        # An engine keeps whole blocks of its own, and so those stored that lie in them.
        if self.window is not None and block_size > max(self.window, own):
            raise InvalidTerms(
                f"Expected stored blocks of at most {max(self.window, own)} tokens, the window of "
                f"a group of layers, got {block_size}. Pass a smaller block_size."
            )
        if self.chunk is not None and self.chunk % block_size:
            raise InvalidTerms(
                f"Expected stored blocks of a divisor of {self.chunk} tokens, the chunk of a group "
                f"of layers, got {block_size}. Pass another block_size."
            )


class Validity:
    """Which prefixes all groups of a model can serve, by the blocks that are stored of each.

    Args:
        groups: of the model.
        block_size: the tokens of a stored block.
    """

    def __init__(self, groups: Sequence[Group], block_size: int) -> None:
        self.groups = groups
        self._size = block_size
        numbers = range(len(groups))
        #: The numbers of the groups that need all blocks, and of the others.
        self.whole = [number for number in numbers if groups[number].is_whole]
        self.partial = [number for number in numbers if not groups[number].is_whole]

    @classmethod
    def of_rows(cls, groups: int) -> Validity:
        """Return the rules of so many groups that need all blocks."""
        return cls([Group(1)] * groups, 1)

    def numbers(self, states: bool) -> Sequence[int]:
        """Return the numbers of the groups, without those of states if they are not meant."""
        return [n for n, group in enumerate(self.groups) if states or not group.states]

    def longest(
        self,
        first: int,
        count: int,
        leading: Callable[[int, int], int],
        there: Callable[[int, int], Sequence[bool]],
    ) -> int:
        """Return how many stored blocks of a request can be loaded: the most at whose end every
        group is valid.

        Args:
            first: the number of the first of them in the request. What groups need of the blocks
                before it is there.
            count: the most to look at.
            leading: returns how many of the first so many blocks lead, of a group by its number.
            there: returns of each of the first so many blocks whether it is there.
        """
        for number in self.whole:
            count = leading(number, count)
        lasting = [(self.groups[n], _runs(there(n, count))) for n in self.partial] if count else []
        for many in range(count, 0, -1):
            for group, runs in lasting:
                if runs[many] < many - self.first_needed(group, first, many):
                    break
            else:
                return many
        return 0

    def first_needed(self, group: Group, first: int, many: int) -> int:
        """Return the position of the first of so many stored blocks that a group needs at their
        end. ``first``: the number of the first of them in the request."""
        size = group.block_size
        needed = group.first_needed((first + many) * self._size) // size * size  # a whole block
        return max(first, needed // self._size) - first


def _runs(there: Sequence[bool]) -> list[int]:
    """Return for each number of blocks how many of the last of them are there in a row."""
    runs = [0]
    for each in there:
        runs.append(runs[-1] + 1 if each else 0)
    return runs
