# SPDX-License-Identifier: Apache-2.0
"""The layout language: what parses, into what, and where the caret of each error stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portakv import LayoutError
from portakv.layout.language import AXES, parse
from portakv_conformance.judge.grammar import read_layout

READ = {
    "layer | kv block token head dim": (["layer"], ["kv", "block", "token", "head", "dim"]),
    "layer kv | block head dim/32 token dim%32":
        (["layer", "kv"], ["block", "head", "dim/32", "token", "dim%32"]),
    "(kv layer) | (block token) 1 dim": (["(kv layer)"], ["(block token)", "1", "dim"]),
    "block page": ([], ["block", "page"]),
    "page block": ([], ["page", "block"]),
    "block (page)": ([], ["block", "(page)"]),
    "| token dim": ([], ["token", "dim"]),
    "token(head dim)": ([], ["token", "(head dim)"]),
    "  layer|( block token )dim ": (["layer"], ["(block token)", "dim"]),
    "1 | token (dim)": (["1"], ["token", "(dim)"]),
    "token\n(head\tdim)": ([], ["token", "(head dim)"]),
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_groups_are_read_in_order_and_printed_as_they_were(text: str) -> None:
    layout = parse(text)
    assert ([str(g) for g in layout.containers], [str(g) for g in layout.dims]) == READ[text]
    again = parse(" ".join([*map(str, layout.containers), "|", *map(str, layout.dims)]))
    assert (again.containers, again.dims) == (layout.containers, layout.dims)
    assert layout.open_end == read_layout(text).open_end


def test_shares_says_where_an_axis_has_no_dimension_to_itself() -> None:
    layout = parse("(kv layer) | (block token) head (dim/2 dim%2)")
    shared = {axis for axis in AXES if layout.shares(axis)}
    assert shared == {"kv", "layer", "block", "token"}


# text, what the caret points at (its position, or the word that begins there), part of the message
ERRORS = [
    ("", 0, "no dimension"),
    ("layer |", 7, "no dimension"),
    ("layer | ", 7, "no dimension"),
    ("token heads dim", "heads", "Unknown axis 'heads'; the axes are layer, kv, block"),
    ("token dim32", "dim32", "Unknown axis 'dim32'"),
    ("Token dim", "Token", "Unknown axis 'Token'"),
    ("token batch/2 dim", "batch", "Unknown axis 'batch'"),
    ("token dim token", 10, "'token' occurs twice"),
    ("layer | layer token dim", 8, "'layer' occurs twice"),
    ("token dim dim/2", "dim/2", r"'dim' occurs twice \(dim and dim/2\)"),
    ("token dim/2 dim/2", 12, "'dim' occurs twice"),
    ("token dim/2 dim%2 dim%2", 18, "'dim' occurs twice"),
    ("token dim/2 dim%4", "dim%4", "dim/2 and dim%4 do not belong together"),
    ("token dim/2", "dim/2", "dim/2 needs its partner dim%2"),
    ("token head%4 dim", "head%4", "head%4 needs its partner head/4"),
    ("token dim/ dim%2", "dim/", "needs a positive number after `/`"),
    ("token dim/2 dim%0", "dim%0", "needs a positive number after `%`"),
    ("token ((head dim))", 7, "do not nest"),
    ("token (head dim", 6, "never closed"),
    ("token head) dim", 10, "closes nothing"),
    ("token () dim", 7, "closes nothing"),
    ("layer | kv | token dim", 11, "at most once"),
    ("(layer | token) dim", 7, "outside of parentheses"),
    ("token (head 1) dim", 12, "cannot stand in parentheses"),
    ("token 2 dim", "2", "'2' is not part of the layout language"),
    ("token 1x dim", "1x", "'1' is not part of the layout language"),
    ("token, dim", ",", "',' is not part"),
    ("token  \t ; dim", ";", "';' is not part"),
    ("token head", 10, "must name 'dim'"),
    ("block token head", 16, r"scale, pass tensor.unsqueeze\(-1\), or write '\(head dim\)'"),
    ("layer | head dim ", 16, "must name 'token'"),
    ("block token page", "token", "cannot go together with 'token'"),
    ("block (page head)", "head", "cannot go together with 'head'"),
    ("dim page block", 0, "cannot go together with 'dim'"),
    ("layer | page", "page", "must name `block`"),
    ("block page/2 page%2", "page/2", "opaque and cannot be split"),
    ("kv/2 token kv%2 dim", 0, "`kv` cannot be split"),
    ("layer |\n  token\n  width", "width", "Unknown axis 'width'"),  # shown in one line
]


@pytest.mark.parametrize(("text", "at", "why"), ERRORS, ids=[repr(e[0]) for e in ERRORS])
def test_an_error_shows_the_string_and_the_place(text: str, at: int | str, why: str) -> None:
    with pytest.raises(LayoutError, match=why) as caught:
        parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown == "    " + text.replace("\t", " ").replace("\n", " ")
    assert caret == " " * (4 + (text.index(at) if isinstance(at, str) else at)) + "^"


@pytest.mark.parametrize("text", [None, 5, ["token", "dim"], b"token dim"])
def test_what_is_no_string_is_a_layout_error(text: object) -> None:
    with pytest.raises(LayoutError, match="string of axis names"):
        parse(text)  # type: ignore[arg-type]


_WORDS = (*AXES, "dim/2", "dim%2", "head/4", "head%4", "head%2", "block/2", "1", "(", ")", "|")


@settings(max_examples=5 * settings().max_examples)
@given(st.lists(st.sampled_from(_WORDS), max_size=8))
def test_any_words_parse_or_raise_a_layout_error_that_points_into_them(words: list[str]) -> None:
    text = " ".join(words)
    try:
        parse(text)
    except LayoutError as error:
        _, shown, caret = str(error).split("\n")
        assert shown == "    " + text
        assert 4 <= caret.index("^") <= len(shown)


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """A well-formed layout string of random axes, splits, groups and spaces."""
    axes = ["token", "dim", *draw(st.sets(st.sampled_from(["layer", "kv", "block", "head"])))]
    split = draw(st.sets(st.sampled_from([axis for axis in axes if axis != "kv"])))
    words = [f for axis in axes for f in ([f"{axis}/2", f"{axis}%2"] if axis in split else [axis])]
    left = draw(st.permutations(words))
    groups = []
    while left:
        size = draw(st.integers(0, 3))
        groups.append(f"({' '.join(left[:size])})" if size else left[0])
        left = left[max(1, size) :]
    for at in draw(st.lists(st.integers(0, len(groups)), max_size=2)):
        groups.insert(at, "1")
    bar = draw(st.integers(0, len(groups) - 1))
    space = draw(st.sampled_from([" ", "  ", "\t"]))
    return space.join([*groups[:bar], "|", *groups[bar:]] if bar else groups)


@settings(max_examples=2 * settings().max_examples)
@given(layouts())
def test_parser_and_oracle_read_a_string_alike(text: str) -> None:
    """The oracle has a separate parser."""
    actual = parse(text)
    expected = read_layout(text)
    assert _plain(g.factors for g in actual.containers) == _plain(expected.left)
    assert _plain(g.factors for g in actual.dims) == _plain(expected.right)
    assert actual.open_end == expected.open_end


def _plain(groups: Iterable[Iterable[Any]]) -> list[list[tuple[str, str, int]]]:
    return [[(f.axis, f.part, f.n) for f in group] for group in groups]
