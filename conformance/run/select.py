# SPDX-License-Identifier: Apache-2.0
"""Which cases a reader means who names some: by id, or by any beginning of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FOLDER = "cases/"


def chosen(ids: Sequence[str], words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The ids that words mean, in the order of ``ids``, and the words that mean none.

    A word is an id, ``file::test`` for all its parameters, or a file for all its tests; the folder
    ``cases/`` and the ending ``.py`` need not be written.
    """
    wanted = {word: {id for id in ids if _means(word, id)} for word in words}
    found = set().union(*wanted.values())
    return [id for id in ids if id in found], [word for word, some in wanted.items() if not some]


def counted(cases: int) -> str:
    """``1 case was``, ``2 cases were``."""
    return "1 case was" if cases == 1 else f"{cases:,} cases were"


def _means(word: str, id: str) -> bool:
    file, _, test = id.removeprefix(_FOLDER).partition("::")
    asked_file, _, asked_test = word.removeprefix(_FOLDER).partition("::")
    same_file = asked_file.removesuffix(".py") == file.removesuffix(".py")
    return same_file and asked_test in ("", test, test.partition("[")[0])
