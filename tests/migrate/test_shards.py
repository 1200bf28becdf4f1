# SPDX-License-Identifier: Apache-2.0
"""Windows and pieces: each cell and position of a reader once, from who has it, in whatever
sharding, layout and block size either side holds the model; judged by numpy and the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.cache_cases import Cache
from support.migrate_cases import WIDTHS, Held, Rank, drawn_model, ranks

from portakv import Index, copy_rows
from portakv.errors import LayoutError
from portakv.migrate.messages import Group
from portakv.migrate.shards import Piece, Shard, deal, overlap, pieces, slices, unlike

sides = st.integers(1, 8).flatmap(
    lambda layers: st.tuples(st.just(layers), st.integers(1, 6), st.integers(1, 40))
)


def pulled(reader: Rank, owners: list[Rank], result: list[Piece]) -> Any:
    """Count how often each cell and position is brought; each must be there."""
    brought = np.zeros([b - a for a, b, _ in (reader.layers, reader.heads)] + [len(reader.tokens)])
    for piece in result:
        ids = np.ones(len(reader.tokens), bool) if piece.ids is None else piece.ids
        owner = owners[piece.owner]
        assert not (ids & ~owner.tokens).any()
        assert overlap(piece.box, reader.box) == overlap(piece.box, owner.box) == piece.box
        local = slices(piece.box, reader.box)
        brought[local["layers"], local["heads"], ids] += 1
    return brought


@given(sides, st.data())
def test_each_cell_and_position_comes_once_from_who_has_it(
    extents: tuple[int, int, int], data: st.DataObject
) -> None:
    owners = data.draw(ranks(*extents))
    readers = data.draw(ranks(*extents))
    here = [None if owner.tokens.all() else owner.tokens for owner in owners]
    prefer = data.draw(st.lists(st.integers(0, len(owners) - 1), max_size=3))
    for reader in readers:
        result = pieces(reader.box, [owner.box for owner in owners], here, prefer)
        assert (pulled(reader, owners, result) == 1).all()


@given(sides, st.sampled_from([*WIDTHS]), st.data())
def test_ranks_of_any_size_read_what_ranks_of_another_hold(
    extents: tuple[int, int, int], widths: tuple[int, ...], data: st.DataObject
) -> None:
    """TP, PP, CP, layouts and block sizes differ: every requested row arrives, and
    nothing else of its caches changes."""
    layers = min(extents[0], 4)
    heads = extents[1]
    tokens = extents[2]
    heads = 1 if len(widths) == 1 else heads
    model = drawn_model(layers, tokens, heads, widths)
    presets = WIDTHS[widths].split()
    owners, readers = [
        [
            Held(rank, data.draw(st.sampled_from(presets)), widths, size, seed)
            for seed, rank in enumerate(data.draw(ranks(layers, heads, tokens)))
        ]
        for size in data.draw(st.tuples(*[st.sampled_from([16, 64, 5])] * 2))
    ]
    for owner in owners:
        owner.fill(model)
    remote = [x.rank.box for x in owners]
    here = [x.rank.tokens for x in owners]
    for reader in readers[:2]:
        wanted = reader.written(model)
        for piece in pieces(reader.rank.box, remote, here):
            owner = owners[piece.owner]
            source = owner.cache.view.slice(**slices(piece.box, owner.rank.box))
            target = reader.cache.view.slice(**slices(piece.box, reader.rank.box))
            if piece.ids is None and reader.rank.tokens.all():  # by blocks, each side its own
                lists = [Index(x.blocks.tolist(), step=x.size) for x in (owner, reader)]
            else:
                ids = owner.slots if piece.ids is None else np.where(piece.ids, owner.slots, -1)
                lists = [Index(torch.from_numpy(x)) for x in (ids, reader.slots)]
            copy_rows(source, target, *lists, count=tokens).synchronize()
        assert not [*wanted.changes(type(wanted).snapshot(reader.cache.tensors))]


def test_tp_2_to_3_of_6_heads_takes_four_pieces() -> None:
    owners = [((0, 2), heads) for heads in ((0, 3), (3, 6))]
    result = [pieces(((0, 2), heads), owners) for heads in ((0, 2), (2, 4), (4, 6))]
    assert [[piece.owner for piece in one] for one in result] == [[0], [0, 1], [1]]
    assert [piece.box[1] for piece in result[1]] == [(2, 3), (3, 4)]
    remote = [slices(piece.box, owners[piece.owner])["heads"] for piece in result[1]]
    assert remote == [slice(2, 3), slice(0, 1)]


def test_replicas_are_asked_in_the_preferred_order() -> None:
    whole = (0, 4), (0, 2)
    owners = [whole, ((0, 2), (0, 2)), whole]
    assert [x.owner for x in pieces(whole, owners)] == [0]
    assert [x.owner for x in pieces(whole, owners, prefer=[2])] == [2]
    assert [x.owner for x in pieces(whole, owners, prefer=[1, 2])] == [1, 2]


def test_several_bring_positions_only_if_none_has_them_all() -> None:
    whole = ((0, 4), (0, 2))
    even = np.arange(6) % 2 == 0
    assert [x.owner for x in pieces(whole, [whole] * 3, [even, ~even, None])] == [2]
    result = pieces(whole, [whole] * 3, [even, np.arange(6) > 2, ~even])
    ids = [np.flatnonzero(piece.ids).tolist() for piece in result if piece.ids is not None]
    assert ids == [[0, 2, 4], [3, 5], [1]]


@pytest.mark.parametrize(
    ("owners", "here", "message"),
    [
        ([((0, 8), (0, 3))], [], "got 1, none of which has layers 0-7 x heads 3-3. "),
        ([((0, 4), (0, 2)), ((4, 8), (2, 4))], [], " layers 4-7 x heads 0-1,"),
        ([((0, 4), (0, 2)), ((4, 8), (2, 4))], [], ", layers 0-3 x heads 2-3. "),
        ([], [], "got 0, none of which has layers 0-7 x heads 0-3. "),
        ([((0, 8), (0, 4))] * 2, ["11000", "01101"], " layers 0-7 x heads 0-3 at positions 3. "),
        ([((0, 8), (0, 4))], ["000011"], " heads 0-3 at positions 0, 1, 2, 3. "),
        ([((0, 8), (0, 4))], ["0000011"], " heads 0-3 at positions 0, 1, 2, 3, .... "),
    ],
)
def test_what_nobody_holds_is_named(owners: Any, here: list[str], message: str) -> None:
    """Fault 18. Windows with a hole, heads that no owner has, positions that are nowhere."""
    masks = [np.array([*map(int, one)], bool) for one in here]
    with pytest.raises(LayoutError, match="Pass a ticket of every owner") as refused:
        pieces(((0, 8), (0, 4)), owners, masks)
    assert message in str(refused.value)


def test_opaque_pages_come_whole() -> None:
    whole = (0, 4), (0, 1)
    parts = [((0, 2), (0, 1)), ((2, 4), (0, 1))]
    assert [piece.owner for piece in pieces(whole, [*parts, whole], whole=True)] == [2]
    assert [piece.owner for piece in pieces(parts[1], [*parts, whole], whole=True)] == [1]
    with pytest.raises(LayoutError, match="got 0 with all of it, none of which has layers 0-3"):
        pieces(whole, parts, whole=True)


def test_boxes_of_any_number_of_axes_are_dealt() -> None:
    """Weights need one axis, and three."""
    assert deal(((0, 9),), {7: (((0, 4),), None), 8: (((3, 9),), None)}) == (
        [(7, ((0, 4),), None), (8, ((4, 9),), None)],
        [],
    )
    inner = ((1, 2), (1, 2), (1, 2))
    dealt, left = deal(((0, 3),) * 3, {0: (inner, None)})
    assert dealt == [(0, inner, None)]
    count = np.zeros((3, 3, 3))
    for box, _ in left:
        count[tuple(slice(a, b) for a, b in box)] += 1
    assert (count[1, 1, 1], count.sum(), count.max()) == (0, 26, 1)


def test_a_shard_holds_what_its_window_says() -> None:
    view = Cache("vllm-nhd", 2, 3, (8, 8), 2, 4).view
    assert Shard(view).group.box == ((0, 2), (0, 3))
    shard = Shard(view, layers=(4, 6, 8), heads=(3, 6, 6))
    assert shard.group == Group((4, 6, 8), (3, 6, 6), (16, 16), ("float16", "float16"))
    with pytest.raises(LayoutError, match=r"the 2 layers that its view has, .* which names 3"):
        Shard(view, layers=(0, 3, 8))
    with pytest.raises(LayoutError, match="The view has 2 layers; `of` is the number"):
        Shard(view, layers=(0, 2, 1))
    for wrong in ((0, 2), (2, 0, 8), (0, 9, 8), (-1, 1, 8), (3, 3, 8)):
        with pytest.raises(LayoutError, match=r"to be \(from, to, of\)"):
            Shard(view, layers=wrong)  # type: ignore[arg-type]


LOCAL = Group((0, 4, 8), (0, 2, 4), (256, 128), ("float16", "float16"))


@pytest.mark.parametrize(
    ("remote", "message"),
    [
        ({"heads": (3, 4, 4)}, ""),
        ({"numbers": ()}, ""),
        ({"widths": (256,)}, "kv of group 0: 2 here and 1 there"),
        ({"widths": (128, 256)}, "bytes of a row of group 0: (256, 128) here and (128, 256)"),
        ({"layers": (0, 4, 9)}, "layers in all of group 0: 8 here and 9 there"),
        ({"heads": (0, 2, 2)}, "heads in all of group 0: 4 here and 2 there"),
        ({"page": 64}, "tokens of a page of group 0: 0 here and 64 there"),
        ({"numbers": ("float16", "int8")}, "numbers of group 0: float16 here and int8 there"),
    ],
)
def test_shards_that_cannot_become_each_other_are_told_apart(
    remote: dict[str, Any], message: str
) -> None:
    """Fault 19. Other widths, kv, totals; what may differ is not reported."""
    result = unlike([LOCAL], [replace(LOCAL, **remote)])
    assert result.startswith(message)
    assert bool(result) == bool(message)
    assert unlike([LOCAL, LOCAL], [LOCAL]) == "groups: 2 here and 1 there"
