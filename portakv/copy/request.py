# SPDX-License-Identifier: Apache-2.0
"""Read the arguments of a copy: two views, two indices and a count become a `Move`."""

from __future__ import annotations

from math import inf
from operator import index as whole_number
from typing import Any, Protocol, TypeAlias

from portakv.arguments import shown
from portakv.errors import LayoutError, SlotError
from portakv.plan.move import Move
from portakv.view.index import Ids as Ids
from portakv.view.index import Index
from portakv.view.view import KVView
from portakv.view.view import Tensors as Tensors


class HasTensor(Protocol):
    """A memory object of an engine, with its tensors in ``.tensor``."""

    @property
    def tensor(self) -> Any:
        """`Tensors`; anything else is refused when it is used."""


#: A chunk.
MemoryObject: TypeAlias = "Tensors | HasTensor"


def not_views(src: object, dst: object) -> LayoutError:
    """Return the error for a copy of which one side is not a view."""
    name, value = ("dst", dst) if isinstance(src, KVView) else ("src", src)
    return LayoutError(
        f"Expected {name} to be a view, got {shown(value)}. Read tensors through a layout: "
        f"KVView(tensors, layout)."
    )


def move_of(
    src: KVView, dst: KVView, src_index: Ids | None, dst_index: Ids | None, count: object
) -> Move:
    """Return the copy that a caller requests. ``count`` None: the tokens that the indices cover.

    Raises:
        LayoutError: one side is not a view.
        SlotError: a bad count, or sides that cover different numbers of tokens.
    """
    if not (isinstance(src, KVView) and isinstance(dst, KVView)):
        raise not_views(src, dst)
    src_of = src_index if isinstance(src_index, Index) else Index.of(src_index)
    dst_of = dst_index if isinstance(dst_index, Index) else Index.of(dst_index)
    if count is None:
        tokens = _covered(src, dst, src_of, dst_of)
    elif type(count) is int and count >= 0:  # the usual case, without a call
        tokens = count
    else:
        tokens = whole("count", count, "a whole number of at least 0", 0)
    src_of.check_length(tokens, src.slots, "source")
    dst_of.check_length(tokens, dst.slots, "destination")
    return Move(src, dst, src_of, dst_of, tokens)


def _covered(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> int:
    """Return the tokens that both indices cover; raise `SlotError` if they differ."""
    src_tokens = src_index.length
    dst_tokens = dst_index.length
    if src_tokens is None and dst_tokens is None:
        src_tokens = src.slots - src_index.offset
        dst_tokens = dst.slots - dst_index.offset
    tokens = dst_tokens if src_tokens is None else src_tokens
    assert tokens is not None
    if dst_tokens not in (None, tokens):
        raise SlotError(
            f"Expected equally many tokens on both sides, got a source that covers {tokens} and a "
            f"destination of {dst_tokens}. Make them equal, or pass count."
        )
    if tokens < 0:
        raise SlotError(
            f"Expected an index that begins before its end, got one that begins {-tokens} tokens "
            f"after it. Lower its offset."
        )
    return tokens


def whole(name: str, value: object, expected: str, least: float = -inf) -> int:
    """Return an argument that is a whole number; raise `SlotError` if it is not one."""
    try:
        number = whole_number(value)  # type: ignore[arg-type]
        if number >= least and not isinstance(value, bool):
            return number
    except TypeError:
        pass
    raise SlotError(f"Expected {name} to be {expected}, got {value!r}. Pass one.")
