# SPDX-License-Identifier: Apache-2.0
"""The arguments that several calls take: ids, memory objects and whole numbers."""

from __future__ import annotations

from math import inf
from typing import Any, Protocol, TypeAlias

from portakv.arguments import as_whole
from portakv.errors import SlotError
from portakv.view.index import Ids as Ids
from portakv.view.view import Tensors as Tensors


class HasTensor(Protocol):
    """A memory object of an engine, with its tensors in ``.tensor``."""

    @property
    def tensor(self) -> Any:
        """`Tensors`; anything else is refused when it is used."""


#: A chunk.
MemoryObject: TypeAlias = "Tensors | HasTensor"


def whole(name: str, value: object, expected: str, least: float = -inf) -> int:
    """Return an argument that is a whole number; raise `SlotError` if it is not one."""
    number = as_whole(value)
    if number is not None and number >= least:
        return number
    raise SlotError(f"Expected {name} to be {expected}, got {value!r}. Pass one.")
