# SPDX-License-Identifier: Apache-2.0
"""The table of fingerprints by key: bounded, in memory or in a file that survives a restart.

Each group has a ring of records, and a new record takes the place of the oldest. In a file the
rings are mapped, so that a process that dies loses no whole record: each record has a checksum, and
a record that is torn is left out when the file is opened again.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.arguments import invalid, size_text
from portakv.core.xxh3 import checksum, piece_checksums
from portakv.errors import InvalidTerms
from portakv.runtime.resources import fcntl
from portakv.runtime.word_sums import signed
from portakv.witness.fingerprint import Geometry, Sums

#: The most bytes of a key.
KEY = 64
#: The most versions of one key: the first and the last ones.
VERSIONS = 8
#: The first bytes of a file.
MAGIC = b"PortaKV witness\0"
_FORMAT = 1
_HEAD = struct.Struct("<16s2q")  # magic, bytes of the JSON text, its checksum
_ALIGNED = 4096
_MOST_HEAD = 1 << 20
_PLACE_BITS = 20
_DROPPED = 1 << _PLACE_BITS  # places of lost keys
_NONE = (-1,)  # the slots of a key without a fingerprint


class Known(NamedTuple):
    """A fingerprint in a ring.

    Attributes:
        key: of the block.
        block: the engine's block that had the rows.
        sums: the fingerprint, int64 ``[count]``; a view of the ring.
        is_old: it was added before `Ring.renew`.
    """

    key: bytes
    block: int
    sums: Sums
    is_old: bool = False


class Records(NamedTuple):
    """The memory of a ring.

    Attributes:
        heads: of `HEAD`, one for each fingerprint.
        sums: int64 ``[slots, count]``.
    """

    heads: npt.NDArray[Any]
    sums: Sums


class Ring:
    """The fingerprints of a group, oldest first.

    Args:
        records: the memory.
        sealed: records get heads with checksums; a slot whose length is 0 is free.

    Attributes:
        dropped: fingerprints that newer ones have evicted.
        torn: records that were left out since their checksum was wrong.
    """

    def __init__(self, records: Records, sealed: bool) -> None:
        self.dropped = 0
        self.torn = 0
        self._heads = records.heads
        self._sums = records.sums
        self._sealed = sealed
        self._keys: list[bytes | None] = [None] * len(records.heads)
        self._blocks = [0] * len(records.heads)
        self._slots = dict[bytes, list[int]]()  # at most one entry for each record
        self._last = dict[int, bytes]()  # the key of each engine's block that has a record
        self._next = 0
        self._past = 0  # slots from here on were never used
        self._order = 0
        # By place the rest of the hash of a key without some of its fingerprints; 0: none.
        self._lost = [np.zeros(_DROPPED, np.uint64), np.zeros(_DROPPED, np.uint64)]
        self._marked = 0
        if sealed:
            self._read()

    def __len__(self) -> int:
        return sum(len(slots) for slots in self._slots.values())

    @property
    def keys(self) -> KeysView[bytes]:
        """Return the keys that have a fingerprint."""
        return self._slots.keys()

    def agree(self, keys: Sequence[bytes], sums: Sums) -> list[bool]:
        """Return of each key whether its newest fingerprint begins with these sums and is not old.

        ``sums``: int64 ``[keys, n]``.
        """
        slots = np.array([self._slots.get(key, _NONE)[-1] for key in keys], np.intp)
        known = self._sums[:, : sums.shape[1]]
        # Keys that were stored by one call lie next to each other, and are not copied.
        first, past = (slots[0], slots[0] + len(slots)) if len(slots) else (0, 0)
        is_run = first >= 0 and np.array_equal(slots, np.arange(first, past))
        equal = ((known[first:past] if is_run else known[slots]) == sums).all(1)
        agrees: list[bool] = (equal & (slots >= 0) & (self._heads["old"][slots] == 0)).tolist()
        return agrees

    def add(self, keys: Sequence[bytes], blocks: Sequence[int], sums: Sums) -> None:
        """Add a version of each key, unless the ring has it already.

        ``blocks``: the engine's blocks that have the rows. ``sums``: int64 ``[keys, count]``.
        """
        known = self._slots
        # A prompt that is computed again has equal rows: most keys have this version as their last.
        has_last = [] if known.keys().isdisjoint(keys) else self.agree(keys, sums)
        rows = list[int]()
        for row, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            has_it = has_last and has_last[row]
            if not has_it and (key not in known or not self._has(key, sums[row])):
                rows.append(row)
                known.setdefault(key, [])
            self._last[block] = key
        # A ring's end divides the rows, and no two may need one slot.
        while rows:
            some = rows[: len(self._keys) - self._next]
            self._write(some, keys, blocks, sums)
            rows = rows[len(some) :]

    def _has(self, key: bytes, sums: Sums) -> bool:
        """Return whether the ring has a version of a key; make room for one more otherwise."""
        slots = self._slots[key]
        for slot in slots:
            if np.array_equal(self._sums[slot], sums):
                self._heads["old"][slot] = 0
                if slot != slots[-1]:
                    slots.remove(slot)
                    slots.append(slot)
                    if self._sealed:
                        self._stamp(slot)
                return True
        while len(slots) >= VERSIONS:  # more if one call has a key more than once
            # A tier that has the first version saves no other one.
            self._evict(slots[1], slots[1] + 1)
        return False

    def _write(
        self, rows: Sequence[int], keys: Sequence[bytes], blocks: Sequence[int], sums: Sums
    ) -> None:
        """Write new records from the next slot on."""
        first = self._next
        past = first + len(rows)
        self._evict(first, past)
        self._sums[first:past] = sums if len(rows) == len(sums) else sums[rows]
        for slot, row in zip(range(first, past), rows, strict=True):
            key = keys[row]
            self._keys[slot] = key
            self._blocks[slot] = blocks[row]
            self._slots.setdefault(key, []).append(slot)
        self._heads["old"][first:past] = 0
        if self._sealed:
            self._seal(range(first, past))
        self._next = past % len(self._keys)
        self._past = max(self._past, past)

    def _seal(self, slots: range) -> None:
        """Write the heads of new records, whose checksums come last."""
        heads = self._heads[slots.start : slots.stop]
        heads["check"] = 0
        heads["order"] = np.arange(self._order, self._order + len(slots))
        heads["block"] = self._blocks[slots.start : slots.stop]
        keys = [key or b"" for key in self._keys[slots.start : slots.stop]]
        padded = b"".join(key.ljust(KEY, b"\0") for key in keys)
        heads["key"] = np.frombuffer(padded, np.uint8).reshape(-1, KEY)
        heads["length"] = [len(key) + 1 for key in keys]
        heads["check"] = checks_of(heads, self._sums[slots.start : slots.stop])
        self._order += len(slots)

    def _stamp(self, slot: int) -> None:
        """Write that a record is the newest one. If the process dies meanwhile, it is torn."""
        self._heads["order"][slot] = self._order
        self._heads["check"][slot] = check_of(self._heads[slot], self._sums[slot])
        self._order += 1

    def versions(self, key: bytes) -> list[Known]:
        """Return the fingerprints of a key, newest first."""
        return [self._known(slot) for slot in reversed(self._slots.get(key, []))]

    def renew(self) -> None:
        """Note that all fingerprints are of former rows."""
        self._heads["old"][: self._past] = 1

    def was_dropped(self, key: bytes) -> bool:
        """Return whether the ring has lost a version of a key, or never had it.

        A key is forgotten after an eighth to a quarter as many others as there are places, and
        rarely before. Another key has the same mark with a probability of 2^-44.
        """
        (mark, place) = divmod(hash(key) % (1 << 64), _DROPPED)
        return any(lost[place] == mark + 1 for lost in self._lost)

    def lose(self, keys: Iterable[bytes]) -> None:
        """Note that keys have a version whose fingerprint is not taken."""
        hashes = np.array([*map(hash, keys)], np.int64).view(np.uint64)
        # Old marks are forgotten, else every place would have one in the end.
        if self._marked + len(hashes) > _DROPPED // 8:
            self._lost = [self._lost[1], np.zeros(_DROPPED, np.uint64)]
            self._marked = 0
        self._lost[1][hashes & (_DROPPED - 1)] = (hashes >> _PLACE_BITS) + 1
        self._marked += len(hashes)

    def key_in(self, block: int) -> bytes | None:
        """Return the key whose rows an engine's block has; None: it is not known."""
        return self._last.get(block)

    def rest(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Note that each of the engine's blocks has the rows of its key now."""
        self._last.update(zip(blocks, keys, strict=True))

    def forget(self, blocks: Iterable[int]) -> None:
        """Note that the rows of an engine's blocks are not known."""
        for block in self._last.keys() & set(blocks):
            del self._last[block]

    def with_sum(self, at: int, value: int) -> Iterator[Known]:
        """Yield the fingerprints that have a sum at a place, newest first."""
        found = np.flatnonzero(self._sums[: self._past, at] == value)
        # The ring begins, with its oldest fingerprint, at the next slot that is written.
        for slot in sorted(found.tolist(), key=self._age):
            if self._keys[slot] is not None:
                yield self._known(slot)

    def _age(self, slot: int) -> int:
        """Return the number of slots that were written after a slot."""
        return (self._next - 1 - slot) % len(self._keys)

    def _known(self, slot: int) -> Known:
        key = self._keys[slot]
        assert key is not None
        return Known(key, self._blocks[slot], self._sums[slot], bool(self._heads["old"][slot]))

    def _evict(self, first: int, past: int) -> None:
        """Remove the records of a run of slots."""
        gone = enumerate(self._keys[first:past], first)
        records = [(slot, key) for slot, key in gone if key is not None]
        if not records:
            return
        for slot, key in records:
            slots = self._slots[key]
            slots.remove(slot)
            if not slots:
                del self._slots[key]
        self._keys[first:past] = [None] * (past - first)
        if self._sealed:
            self._heads["length"][first:past] = 0
        self.dropped += len(records)
        self.lose(key for _, key in records)

    def _read(self) -> None:
        """Find the records of a file, and clear those that are torn."""
        used = np.flatnonzero(self._heads["length"])
        whole = list[int]()  # oldest first
        for slot in used[np.argsort(self._heads["order"][used])].tolist():
            if not is_whole(self._heads[slot], self._sums[slot]):
                self._heads["length"][slot] = 0
                self.torn += 1
                continue
            key = key_in(self._heads[slot])
            self._keys[slot] = key
            self._blocks[slot] = int(self._heads["block"][slot])
            self._slots.setdefault(key, []).append(slot)
            whole.append(slot)
        if whole:
            self._order = int(self._heads["order"][whole[-1]]) + 1
            self._past = max(whole) + 1
            # Not after the newest: a version that was stored again keeps its place in the ring.
            self._next = self._past if self._past < len(self._keys) else whole[0]


#: A record without its sums: whether it is old, the checksum of the rest, its order, the engine's
#: block, the bytes of the key + 1.
HEAD = np.dtype(
    [
        ("old", "<u8"),
        ("check", "<u8"),
        ("order", "<u8"),
        ("block", "<i8"),
        ("length", "<u8"),
        ("key", "u1", (KEY,)),
    ]
)
_UNCHECKED = 16  # bytes of a head that its checksum leaves out: "old" and "check"


def record_bytes(geometry: Geometry) -> int:
    """Return the bytes of a record."""
    return HEAD.itemsize + geometry.nbytes


def is_whole(head: Any, sums: Sums) -> bool:
    """Return whether a record of a file is in use and not torn."""
    length = int(head["length"])
    return 0 < length <= KEY + 1 and int(head["check"]) == check_of(head, sums)


def key_in(head: Any) -> bytes:
    """Return the key of a record."""
    return bytes(head["key"][: int(head["length"]) - 1])


def check_of(head: Any, sums: Sums) -> int:
    """Return the checksum of a record."""
    return checksum(sums, seed=checksum(head.tobytes()[_UNCHECKED:]))


def checks_of(heads: npt.NDArray[Any], sums: Iterable[Sums]) -> list[int]:
    """Return `check_of` of each of many records, by one call for all heads."""
    text = heads.tobytes()
    size = HEAD.itemsize
    pieces = np.empty((len(heads), 2), np.int64)
    pieces[:, 0] = np.arange(len(heads)) * size + _UNCHECKED
    pieces[:, 1] = size - _UNCHECKED
    seeds = piece_checksums(text, pieces.tobytes(), len(text))
    return [checksum(row, seed) for row, seed in zip(sums, seeds, strict=True)]


class Table:
    """The rings of all groups.

    Args:
        geometries: of each group.
        nbytes: of all rings together.
        file: that has the rings; None: memory.

    Raises:
        InvalidTerms: ``nbytes`` is too small for a block of each group; the file is open in another
            process, is torn, or has other groups, layouts or bytes.
    """

    def __init__(
        self, geometries: Mapping[str, Geometry], nbytes: int, file: Path | None = None
    ) -> None:
        each = sum(record_bytes(geometry) for geometry in geometries.values())
        self.slots = nbytes // each
        if self.slots < 1:
            least = size_text(each)
            raise invalid("nbytes", f"at least {least} for a block of each group", nbytes)
        self._fd: int | None = None
        self._memory: Any = None
        head = _head_of(geometries, self.slots)
        size = len(head) + self.slots * each
        if file is None:
            self._memory = bytearray(size)
        else:
            self._fd = _opened(file, head, size)
            self._memory = mmap.mmap(self._fd, size)
        records = _records_in(
            np.frombuffer(self._memory, np.uint8), len(head), self.slots, geometries
        )
        self.rings = {name: Ring(each, file is not None) for name, each in records.items()}

    def close(self) -> None:
        """Release the file, which keeps the rings. The table has no rings then."""
        self.rings = {}
        if self._fd is not None:
            self._memory.flush()
            # Arrays may retain the mapping, which has the file open too.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = None


def _records_in(
    memory: npt.NDArray[np.uint8], begin: int, slots: int, geometries: Mapping[str, Geometry]
) -> dict[str, Records]:
    """Return the records of each group in memory, from a byte on."""
    records = dict[str, Records]()
    for name, geometry in geometries.items():
        middle = begin + slots * HEAD.itemsize
        end = middle + slots * geometry.nbytes
        heads = memory[begin:middle].view(HEAD)
        records[name] = Records(heads, memory[middle:end].view(np.int64).reshape(slots, -1))
        begin = end
    return records


def _head_of(geometries: Mapping[str, Geometry], slots: int) -> bytes:
    """Return the first bytes of a file, padded to whole pages."""
    groups = {name: asdict(geometry) for name, geometry in geometries.items()}
    text = json.dumps({"format": _FORMAT, "slots": slots, "groups": groups}).encode()
    head = _HEAD.pack(MAGIC, len(text), signed(checksum(text))) + text
    return head.ljust(_whole_pages(len(head)), b"\0")


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _opened(file: Path, head: bytes, size: int) -> int:
    """Return the descriptor of a locked file that has a head and a size, made if there is none.

    Raises as `Table`.
    """
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise invalid("file", "a file that can be written", str(file), f"{error}.") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            do = "Give each rank its own file."
            raise invalid("file", "a file that no other witness has", str(file), do) from None
        present = os.pread(fd, max(len(head), _MOST_HEAD), 0)
        if not present.strip(b"\0"):  # new, or its maker died before the first byte
            os.ftruncate(fd, 0)
            _allocate(fd, file, size)
            os.pwrite(fd, head, 0)
        else:
            _check_head(file, present, head)
            if os.fstat(fd).st_size != size:
                got = f"{os.fstat(fd).st_size} bytes"
                raise invalid("file", f"a file of {size} bytes", got, f"Delete {file}.")
            _allocate(fd, file, size)  # a copy of a file may lack the space of zeros
    except BaseException:
        os.close(fd)
        raise
    return fd


def _allocate(fd: int, file: Path, size: int) -> None:
    """Allocate the space of a file: a write to mapped memory without it would end the process."""
    before = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.ftruncate(fd, before)
        do = f"{error.strerror}. Free space, or pass fewer nbytes."
        raise invalid("file", f"a file with space for {size_text(size)}", str(file), do) from error


def _check_head(file: Path, present: bytes, expected: bytes) -> None:
    """Raise `InvalidTerms` unless a file begins as expected."""
    if present.startswith(expected):
        return
    text = head_text(file, present)
    wanted = head_text(file, expected)
    differing = [name for name in ("format", "slots", "groups") if text[name] != wanted[name]]
    name = differing[0]
    do = f"Delete {file}, or name another file for this model."
    if name == "slots":
        do = f"Pass the nbytes of before, or delete {file}."
    raise invalid("file", f"a table with {name} {wanted[name]}", text[name], do)


def head_text(file: Path, data: bytes) -> dict[str, Any]:
    """Return the description of a file's rings, from its first bytes.

    Raises `InvalidTerms` if the file is torn or another file.
    """
    if len(data) >= _HEAD.size:
        (magic, length, check) = _HEAD.unpack_from(data)
        text = data[_HEAD.size : _HEAD.size + max(0, length)]
        if magic == MAGIC and signed(checksum(text)) == check:
            described: dict[str, Any] = json.loads(text)
            return described
    raise InvalidTerms(
        f"Expected file to be a table of fingerprints, got {file}, which is torn or another file. "
        f"Delete it, or name another file."
    )


class FileRing:
    """The fingerprints of a group in a file, which another process may write meanwhile.

    Attributes:
        geometry: of the fingerprints.
        records: `is_whole` says whether a record counts.
    """

    def __init__(self, geometry: Geometry, records: Records) -> None:
        self.geometry = geometry
        self.records = records
        # The first words of keys, next to each other: a search reads them alone.
        self._words = records.heads["key"].view(np.uint64)[:, 0].copy()

    def keys(self) -> set[bytes]:
        """Return the keys that had fingerprints when the file was read, also torn ones."""
        heads = self.records.heads
        return {key_in(heads[slot]) for slot in np.flatnonzero(heads["length"]).tolist()}

    def versions(self, key: bytes) -> list[Known]:
        """Return the fingerprints of a key that were there when the file was read, newest first."""
        (heads, sums) = self.records
        (word,) = np.frombuffer(key[:8].ljust(8, b"\0"), np.uint64)
        alike = np.flatnonzero(self._words == word)  # few, as keys are hashes
        copies = [(heads[slot].copy(), sums[slot].copy()) for slot in alike]
        found = [each for each in copies if is_whole(*each) and key_in(each[0]) == key]
        found.sort(key=lambda each: -int(each[0]["order"]))
        return [Known(key, int(head["block"]), sums, bool(head["old"])) for head, sums in found]


def read_file(file: Path) -> dict[str, FileRing]:
    """Return the ring of each group of a file. Raises `InvalidTerms` as `head_text`, or OSError."""
    with file.open("rb") as opened:
        head = opened.read(_MOST_HEAD)
    described = head_text(file, head)
    if described["format"] != _FORMAT:
        raise invalid("file", f"a table with format {_FORMAT}", described["format"])
    (_, length, _) = _HEAD.unpack_from(head)
    begin = _whole_pages(_HEAD.size + length)
    geometries = {name: geometry_of(fields) for name, fields in described["groups"].items()}
    size = begin + described["slots"] * sum(record_bytes(x) for x in geometries.values())
    if file.stat().st_size < size:
        raise invalid("file", f"a table of {size} bytes", f"{file} of {file.stat().st_size} bytes")
    memory = np.memmap(file, np.uint8, "r", shape=(size,))
    records = _records_in(memory, begin, described["slots"], geometries)
    return {name: FileRing(geometry, records[name]) for name, geometry in geometries.items()}


def geometry_of(fields: Mapping[str, Any]) -> Geometry:
    """Return the geometry of values from JSON."""
    return Geometry(**{**fields, "widths": tuple(fields["widths"])})
