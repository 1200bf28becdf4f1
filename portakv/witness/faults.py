# SPDX-License-Identifier: Apache-2.0
"""Faults of restored blocks, and their names by comparison with other known fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from portakv.errors import TransferError
from portakv.witness.fingerprint import Geometry, Sums
from portakv.witness.table import Known, Ring

Kind: TypeAlias = Literal[
    "changed bytes",
    "zeros",
    "not written",
    "half written",
    "missing layers",
    "missing group",
    "other block",
    "shifted blocks",
    "shifted tokens",
    "older version",
    "planes exchanged",
    "heads exchanged",
    "layers exchanged",
    "other rank",
    "other sharding",
    "unlike",
]
Mask: TypeAlias = npt.NDArray[np.bool_]
#: Fingerprints with one equal sum that are compared whole, for the name of a fault.
_CANDIDATES = 64


@dataclass(frozen=True)
class Fault:
    """A restored block whose rows differ from the rows that were stored under its key.

    Attributes:
        group: the name of the view.
        key: the engine's hash of the block.
        block: the engine's block that was restored.
        layers: layers that differ, by their place in the view.
        heads: heads that differ, by their place in the view.
        tokens: tokens of the block that differ, as ranges [first, past the last); empty for pages
            and packed blocks.
        kind: the pattern of the difference; "unlike" if no known fingerprint explains it.
        versus: the rows that explain it, such as "key 1f2e..., block 7"; may be empty.
        sentence: the fault in English, for a log.
        report: the file for ``portakv witness show``; None if none was written.
    """

    group: str
    key: bytes
    block: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]
    kind: Kind
    versus: str
    sentence: str
    report: Path | None = None


class WrongRows(TransferError):
    """Restored blocks differ from the stored ones; ``faults`` lists them. Compute them again."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(" ".join(fault.sentence for fault in faults))
        self.faults = list(faults)


class Other(NamedTuple):
    """A fingerprint of the same key elsewhere: its place, its geometry, the sums, and whether it is
    of former weights."""

    place: str
    geometry: Geometry
    sums: Sums
    is_old: bool = False


#: The fingerprints of one key in an engine with another number of ranks, of each rank in order.
Sharding: TypeAlias = Sequence[Sequence[Other]]


class Evidence(NamedTuple):
    """The fingerprints by which a fault gets its name.

    Attributes:
        geometry: of the group.
        actual: of the restored rows.
        versions: of the rows that were stored under the key, newest first.
        before: of the key whose rows the engine's block had before the load, newest first.
        ring: of the group.
        key: of the block.
        block: the engine's block.
        others: returns the fingerprints of the key in other ranks.
        shardings: returns those in engines with another number of ranks.
        elsewhere: returns whether another group of this key has right rows.
    """

    geometry: Geometry
    actual: Sums
    versions: Sequence[Sums]
    before: Sequence[Known]
    ring: Ring
    key: bytes
    block: int
    others: Callable[[], Iterable[Other]]
    shardings: Callable[[], Iterable[Sharding]]
    elsewhere: Callable[[], bool]


class Name(NamedTuple):
    """The name of a fault.

    Attributes:
        kind: of the fault.
        versus: the rows that explain it; empty if no equal sums do.
        source: the key whose rows the block has.
        sums: the fingerprint that explains the rows.
    """

    kind: Kind
    versus: str = ""
    source: bytes | None = None
    sums: Sums | None = None

    @property
    def is_explained(self) -> bool:
        """Return whether equal sums explain the rows, so that no other rounding does."""
        return bool(self.versus)


class Difference:
    """The sums that differ between the rows of a block and those that were stored.

    Attributes:
        heads: bool ``[layers, kv, heads]``.
        segments: bool ``[layers, kv, segments]``.
        planes: bool ``[layers, kv]``.
    """

    def __init__(self, geometry: Geometry, expected: Sums, actual: Sums) -> None:
        self.geometry = geometry
        self.expected = expected
        self.actual = actual
        unequal: Mask = expected != actual
        self.heads: Mask = geometry.by_head(unequal)
        self.segments: Mask = geometry.by_segment(unequal)
        self.planes: Mask = np.logical_or(self.heads.any(2), self.segments.any(2))

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers that differ."""
        return tuple(np.flatnonzero(self.planes.any(1)).tolist())

    @property
    def kv(self) -> tuple[int, ...]:
        """Return the kv that differ."""
        return tuple(np.flatnonzero(self.planes.any(0)).tolist())

    @property
    def differing_heads(self) -> tuple[int, ...]:
        """Return the heads that differ."""
        return tuple(np.flatnonzero(self.heads.any((0, 1))).tolist())

    @property
    def tokens(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges of tokens that differ; none if segments are not tokens."""
        each = self.geometry.tokens
        if not each:
            return ()
        marks = np.diff(np.concatenate([[0], self.segments.any((0, 1)).view(np.int8), [0]]))
        begins = np.flatnonzero(marks == 1) * each
        pasts = np.flatnonzero(marks == -1) * each
        return tuple(zip(begins.tolist(), pasts.tolist(), strict=True))

    @property
    def may_be_rounded(self) -> bool:
        """Return whether an engine that computes a block once more may get such rows.

        Its last bits then differ from some layer on, in each head and in nearly each token.
        """
        behind = slice(self.geometry.layers // 2, None)
        tokens = self.segments[behind].mean() > 0.75
        return bool(self.heads[behind].all() and tokens)

    @property
    def is_whole(self) -> bool:
        """Return whether all sums differ."""
        return bool(self.heads.all() and self.segments.all())

    @property
    def has_whole_layers(self) -> bool:
        """Return whether all sums of some layers differ, and none of the other layers."""
        rows = self.planes.any(1)
        whole = self.heads[rows].all() and self.segments[rows].all()
        return bool(whole and not rows.all())

    @property
    def has_whole_planes(self) -> bool:
        """Return whether all sums of the planes that differ do."""
        return bool(self.heads[self.planes].all() and self.segments[self.planes].all())

    @property
    def is_cut(self) -> bool:
        """Return whether a copy that ended early, or began late, explains the places of sums."""
        segments = self.segments
        if not self.heads[self.planes].all() or segments.all() or segments.sum() < 2:
            return False
        for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 2, 0)):
            flat = segments.transpose(order).ravel()
            if not (flat[1:] < flat[:-1]).any() or not (flat[1:] > flat[:-1]).any():
                return True
        # The same tokens in all planes that differ: each plane is a copy.
        some = segments[self.planes]
        same = (some == some[0]).all()
        steps = int((some[0][1:] != some[0][:-1]).sum())
        return bool(same and steps == 1 and self.planes.sum() > 1)

    def is_explained_by(self, sums: Sums) -> bool:
        """Return whether the sums that differ are those of other rows of the same places."""
        geometry = self.geometry
        by_head = geometry.by_head(self.actual) == geometry.by_head(sums)
        if self.heads.any() and bool(by_head[self.heads].all()):
            return True
        by_segment = geometry.by_segment(self.actual) == geometry.by_segment(sums)
        return bool(self.segments.any() and by_segment[self.segments].all())


def name_fault(evidence: Evidence, thorough: bool = True) -> tuple[Name, Difference]:
    """Return the name of a fault, and the sums that differ from the most similar version.

    ``thorough``: compare with fingerprints of other blocks, layers, heads and ranks too.
    """
    differences = [
        Difference(evidence.geometry, each, evidence.actual)
        for each in evidence.versions
        if not np.array_equal(each, evidence.actual)
    ]
    if not differences:  # the rows are those of the only version, which is out of date
        differences = [
            Difference(evidence.geometry, np.zeros_like(evidence.actual), evidence.actual)
        ]
    difference = min(differences, key=lambda x: int(x.heads.sum() + x.segments.sum()))
    steps: Sequence[Callable[[Evidence, Difference], Name | None]] = (
        _by_zeros,
        _by_rows_before,
        _by_other_versions,
        _by_other_blocks,
        _by_exchanged_planes,
        _by_exchanged_heads,
        _by_exchanged_layers,
        _by_other_ranks,
        _by_other_shardings,
        _by_shifted_tokens,
    )
    for step in steps if thorough else steps[:3]:
        name = step(evidence, difference)
        if name is not None:
            return name, difference
    return _by_place(difference), difference


def _by_zeros(evidence: Evidence, difference: Difference) -> Name | None:
    zeros = np.zeros_like(evidence.actual)
    if not difference.is_explained_by(zeros):
        return None
    kind = _unwritten(evidence, difference, "zeros")
    return Name(kind, "zeros", sums=zeros)


def _by_rows_before(evidence: Evidence, difference: Difference) -> Name | None:
    for before in evidence.before:
        if before.key != evidence.key and difference.is_explained_by(before.sums):
            kind = _unwritten(evidence, difference, "not written")
            versus = f"the rows that the block had before, of key {short(before.key)}"
            return Name(kind, versus, before.key, before.sums)
    return None


def _unwritten(evidence: Evidence, difference: Difference, whole: Kind) -> Kind:
    """Return the kind of a fault whose rows were not written, by the places that differ."""
    if difference.is_whole:
        return "missing group" if evidence.elsewhere() else whole
    if difference.has_whole_layers:
        return "missing layers"
    if difference.is_cut or difference.has_whole_planes:
        return "half written"
    return whole


def _by_other_versions(evidence: Evidence, difference: Difference) -> Name | None:
    for sums in evidence.versions:
        if sums is not difference.expected and difference.is_explained_by(sums):
            return Name("older version", "another version of this key", evidence.key, sums)
    return None


def _by_other_blocks(evidence: Evidence, difference: Difference) -> Name | None:
    for known in islice(_candidates(evidence, difference), _CANDIDATES):
        if known.key != evidence.key and difference.is_explained_by(known.sums):
            versus = f"key {short(known.key)}, of block {known.block}"
            # The engine's block had these rows once, and they were only written over in part.
            is_left = known.block == evidence.block and not difference.is_whole
            kind = _unwritten(evidence, difference, "other block") if is_left else "other block"
            return Name(kind, versus, known.key, known.sums.copy())
    return None


def _candidates(evidence: Evidence, difference: Difference) -> Iterator[Known]:
    """Yield fingerprints that have the first sum that differs, of a head or of a segment."""
    differing = np.flatnonzero(difference.expected != difference.actual)
    by_head = difference.heads.size
    for some in (differing[differing < by_head], differing[differing >= by_head]):
        # The first differing sum that is not 0, as those of rows that were never written are.
        filled = some[evidence.actual[some] != 0]
        if len(filled):
            at = int(filled[0])
            yield from islice(evidence.ring.with_sum(at, int(evidence.actual[at])), _CANDIDATES)


def _by_exchanged_planes(evidence: Evidence, difference: Difference) -> Name | None:
    geometry = evidence.geometry
    if geometry.kv != 2 or len(set(geometry.widths)) != 1:
        return None
    expected = geometry.by_head(difference.expected)[:, ::-1]
    actual = geometry.by_head(evidence.actual)
    where = difference.heads
    if not actual[where].any() or not (actual == expected)[where].all():
        return None
    return Name("planes exchanged", "the other kv of the same key", evidence.key)


def _by_exchanged_heads(evidence: Evidence, difference: Difference) -> Name | None:
    geometry = evidence.geometry
    expected = geometry.by_head(difference.expected)
    found = _heads_among(geometry.by_head(evidence.actual), expected, difference.heads)
    if found is None:
        return None
    moved = ", ".join(f"{head} has those of {source}" for head, source in found)
    return Name("heads exchanged", f"other heads of the same key: {moved}", evidence.key)


def _heads_among(actual: Sums, known: Sums, differing: Mask) -> list[tuple[int, int]] | None:
    """Return for heads that differ the known head whose rows they have; None if they have none.

    ``actual``: int64 ``[layers, kv, heads]``; ``known`` may have other heads.
    """
    if not differing.any():
        return None
    found = list[tuple[int, int]]()
    for head in np.flatnonzero(differing.any((0, 1))):
        where = differing[:, :, head]
        same = known[where] == actual[:, :, head][where][:, None]
        sources = np.flatnonzero(same.all(0))
        if not len(sources) or not actual[:, :, head][where].any():
            return None
        found.append((int(head), int(sources[0])))
    return found


def _by_exchanged_layers(evidence: Evidence, difference: Difference) -> Name | None:
    geometry = evidence.geometry
    expected = geometry.by_head(difference.expected)
    actual = geometry.by_head(evidence.actual)
    moved = list[str]()
    for layer in difference.layers:
        where = difference.planes[layer]
        same = (expected[:, where] == actual[layer, where]).all((1, 2))
        same[layer] = False
        sources = np.flatnonzero(same)
        if not len(sources):
            return None
        moved.append(f"{layer} has those of {int(sources[0])}")
    versus = f"other layers of the same key: {', '.join(moved)}"
    return Name("layers exchanged", versus, evidence.key)


def _by_other_ranks(evidence: Evidence, difference: Difference) -> Name | None:
    own = evidence.geometry
    for place, geometry, sums, _ in evidence.others():
        if not _have_like_heads(own, geometry):
            continue
        actual = own.by_head(evidence.actual)
        found = _heads_among(actual, geometry.by_head(sums), difference.heads)
        if found is not None:
            moved = ", ".join(f"{head} has those of its {source}" for head, source in found)
            return Name("other rank", f"heads of {place}: {moved}", evidence.key)
    return None


def _have_like_heads(own: Geometry, other: Geometry) -> bool:
    """Return whether equal rows of a head have equal sums in two geometries of as many layers."""
    return own == replace(other, heads=own.heads)


def _by_other_shardings(evidence: Evidence, difference: Difference) -> Name | None:
    """Name rows of an engine with another number of ranks, also if layers and heads have changed
    places: its pages, taken for pages of this engine, have other layers and heads."""
    own = evidence.geometry
    wrong = own.by_head(evidence.actual)[difference.heads]
    if not wrong.any():
        return None
    for sharding in evidence.shardings():
        missing = wrong
        sources = list[str]()
        for rank, known in enumerate(sharding):
            layers: Mask = np.zeros(own.layers, np.bool_)
            for _, geometry, sums, _ in known:
                if _have_like_heads(own, geometry):
                    by_head = geometry.by_head(sums)
                    missing = missing[~np.isin(missing, by_head)]
                    layers |= np.isin(by_head, wrong).any((1, 2))
            if layers.any():
                text = ranges_text(np.flatnonzero(layers).tolist())
                sources.append(f"layers {text} of rank {rank}")
        if not len(missing):
            ranks = "1 rank" if len(sharding) == 1 else f"{len(sharding)} ranks"
            versus = f"rows of {ranks}: {', '.join(sources)}"
            return Name("other sharding", versus, evidence.key)
    return None


def is_of_sharding(own: Geometry, sums: Sums, rank: int, ranks: int, sharding: Sharding) -> bool:
    """Return whether each head of a block has the rows that another number of ranks has stored,
    which are not of former weights.

    Each number of ranks divides the heads in order. More ranks than heads have each head several
    times, next to each other.

    Args:
        own: the geometry of the block.
        sums: its fingerprint.
        rank: that has the block, among ``ranks``.
        sharding: the fingerprints of the block's key.
    """
    actual = own.by_head(sums)
    heads = np.arange(own.heads) + own.heads * rank  # of all ranks
    total = own.heads * ranks

    def are_of(other: Other, here: Mask) -> bool:
        """Return whether some heads have the rows of a block of the rank that should have them."""
        many = other.geometry.heads
        there = heads[here] * many * len(sharding) // total % many
        theirs = other.geometry.by_head(other.sums)[:, :, there]
        is_like = _have_like_heads(own, other.geometry) and not other.is_old
        return is_like and np.array_equal(actual[:, :, here], theirs)

    for source, versions in enumerate(sharding):
        here = heads * len(sharding) // total == source
        if here.any() and not any(are_of(other, here) for other in versions):
            return False
    return True


def _by_shifted_tokens(evidence: Evidence, difference: Difference) -> Name | None:
    geometry = evidence.geometry
    each = geometry.tokens
    if not each or geometry.segments < 3:
        return None
    expected = geometry.by_segment(difference.expected)[difference.planes]
    actual = geometry.by_segment(evidence.actual)[difference.planes]
    for n in range(1, geometry.segments - 1):
        for sign, ours, theirs in (
            (1, actual[:, n:], expected[:, :-n]),
            (-1, actual[:, :-n], expected[:, n:]),
        ):
            if (ours == theirs).all() and ours.any():
                versus = f"the same rows, {sign * n * each} tokens later"
                return Name("shifted tokens", versus, evidence.key)
    if (np.sort(expected, 1) == np.sort(actual, 1)).all():
        return Name("shifted tokens", "the same tokens in another order", evidence.key)
    return None


def _by_place(difference: Difference) -> Name:
    """Return a name by the places that differ alone."""
    if difference.is_whole:
        return Name("unlike")
    if difference.has_whole_layers:
        return Name("missing layers")
    if difference.is_cut:
        return Name("half written")
    if difference.has_whole_planes:
        return Name("unlike")
    return Name("changed bytes")


def shifts_of(sources: Mapping[int, bytes], keys: Sequence[bytes]) -> dict[int, int]:
    """Return the positions of a call whose blocks have the rows of a key some places away, as those
    of a neighbour do, with the number of places.

    ``sources``: for each position whose rows are of another key, that key.
    """
    places = {key: at for at, key in enumerate(keys)}
    moved = {at: places[key] - at for at, key in sources.items() if key in places}
    # Two exchanged blocks are no shift: its neighbours have moved alike.
    return {at: n for at, n in moved.items() if n and n in (moved.get(at - 1), moved.get(at + 1))}


def short(key: bytes) -> str:
    """Return the first digits of a key, as logs show it."""
    digits = key.hex()
    return digits if len(digits) <= 16 else f"{digits[:16]}..."


def ranges_text(numbers: Sequence[int]) -> str:
    """Return numbers as text, such as ``0-3, 7``."""
    parts = list[str]()
    first = 0
    for at, number in enumerate(numbers):
        if at + 1 < len(numbers) and numbers[at + 1] == number + 1:
            continue
        parts.append(str(number) if numbers[first] == number else f"{numbers[first]}-{number}")
        first = at + 1
    return ", ".join(parts)


_SENTENCES: dict[str, str] = {
    "changed bytes": "Some bytes differ",
    "zeros": "The rows are zeros",
    "not written": "The load did not write the block",
    "half written": "The load wrote a part of the block",
    "missing layers": "The load did not write whole layers",
    "missing group": "The load did not write this group, but wrote another group of the key",
    "other block": "The block has the rows of another key",
    "shifted blocks": "The list of blocks is shifted",
    "shifted tokens": "The tokens are at other places in the block",
    "older version": "The block has older rows of this key",
    "planes exchanged": "Keys and values are exchanged",
    "heads exchanged": "Heads are exchanged",
    "layers exchanged": "Layers are exchanged",
    "other rank": "The block has the heads of another rank",
    "other sharding": "The block has rows that another number of ranks has stored",
    "unlike": "The rows are unlike all rows that the witness knows",
}


def sentence_of(group: str, key: bytes, block: int, name: Name, difference: Difference) -> str:
    """Return a fault in English, for a log."""
    geometry = difference.geometry
    parts = [f"layers {ranges_text(difference.layers)} of {geometry.layers}"]
    if geometry.kv > 1:
        parts.append(f"kv {ranges_text(difference.kv)}")
    if geometry.heads > 1 and difference.differing_heads:
        parts.append(f"heads {ranges_text(difference.differing_heads)} of {geometry.heads}")
    if difference.tokens:
        numbers = [n for first, past in difference.tokens for n in range(first, past)]
        parts.append(f"tokens {ranges_text(numbers)}")
    named = f" of group {group!r}" if group else ""
    versus = f"; {name.versus}" if name.versus and name.versus != name.kind else ""
    return (
        f"Wrong rows in block {block}{named}, key {short(key)}: {_SENTENCES[name.kind]}{versus}. "
        f"They differ in {', '.join(parts)}."
    )


def as_json(fault: Fault) -> dict[str, Any]:
    """Return a fault as values for JSON."""
    return {
        "group": fault.group,
        "key": fault.key.hex(),
        "block": fault.block,
        "layers": list(fault.layers),
        "heads": list(fault.heads),
        "tokens": [list(ends) for ends in fault.tokens],
        "kind": fault.kind,
        "versus": fault.versus,
        "sentence": fault.sentence,
    }
