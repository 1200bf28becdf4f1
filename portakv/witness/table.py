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
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from portakv.arguments import invalid, size_text
from portakv.core.xxh3 import checksum
from portakv.errors import InvalidTerms
from portakv.runtime.resources import fcntl
from portakv.witness.fingerprint import Geometry, Sums

#: The most bytes of a key.
KEY = 64
#: The most versions of one key.
VERSIONS = 8
_MAGIC = b"PortaKV witness\0"
_FORMAT = 1
_HEAD = struct.Struct("<16s2q")  # magic, bytes of the JSON text, its checksum
_ALIGNED = 4096
_DROPPED = 1 << 20  # places of evicted keys


class Known(NamedTuple):
    """A fingerprint in a ring.

    Attributes:
        key: of the block.
        block: the engine's block that had the rows.
        sums: the fingerprint, int64 ``[count]``; a view of the ring.
    """

    key: bytes
    block: int
    sums: Sums


class Ring:
    """The fingerprints of a group, oldest first.

    Args:
        geometry: of the fingerprints.
        records: the memory, of `record_type`.
        sealed: records get checksums.

    Attributes:
        dropped: fingerprints that newer ones have evicted.
        torn: records that were left out since their checksum was wrong.
    """

    def __init__(self, geometry: Geometry, records: npt.NDArray[Any], sealed: bool) -> None:
        self.geometry = geometry
        self.dropped = 0
        self.torn = 0
        self._records = records
        self._sealed = sealed
        self._slots = dict[bytes, list[int]]()  # at most one entry for each record
        self._last = dict[int, bytes]()  # the key of each engine's block that has a record
        self._next = 0
        self._order = 0
        self._lost = [bytearray(_DROPPED), bytearray(_DROPPED)]
        self._marked = 0
        if sealed:
            self._read()

    def __len__(self) -> int:
        return sum(len(slots) for slots in self._slots.values())

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def add(self, key: bytes, block: int, sums: Sums) -> bool:
        """Add a version of a key; return False if the ring has it already."""
        slots = self._slots.get(key, [])
        for slot in slots:
            if np.array_equal(self._records["sums"][slot], sums):
                self._last[block] = key
                return False
        if len(slots) == VERSIONS:
            self._drop(slots[0])
        slot = self._next
        self._next = (slot + 1) % len(self._records)
        if self._records["length"][slot]:
            self._drop(slot)

        record = self._records[slot]
        record["check"] = 0
        record["order"] = self._order
        record["block"] = block
        record["key"][: len(key)] = np.frombuffer(key, np.uint8)
        record["length"] = len(key) + 1
        record["sums"] = sums
        if self._sealed:
            record["check"] = _check_of(record)
        self._order += 1
        self._slots.setdefault(key, []).append(slot)
        self._last[block] = key
        return True

    def versions(self, key: bytes) -> list[Known]:
        """Return the fingerprints of a key, newest first."""
        return [self._known(slot) for slot in reversed(self._slots.get(key, []))]

    def was_dropped(self, key: bytes) -> bool:
        """Return whether a version of a key may have been evicted; rarely true for another key."""
        at = crc32(key) % _DROPPED
        return bool(self._lost[0][at] or self._lost[1][at])

    def last_in(self, block: int) -> Known | None:
        """Return the newest fingerprint of the key that an engine's block last had."""
        key = self._last.get(block)
        return next(iter(self.versions(key)), None) if key is not None else None

    def rest(self, block: int, key: bytes) -> None:
        """Note that an engine's block has the rows of a key now."""
        if key in self._slots:
            self._last[block] = key

    def forget(self, block: int) -> None:
        """Note that the rows of an engine's block are not known."""
        self._last.pop(block, None)

    def with_sum(self, at: int, value: int) -> Iterator[Known]:
        """Yield the fingerprints that have a sum at a place, newest first."""
        return self.with_sums(slice(at, at + 1), value)

    def with_sums(self, places: slice, value: int) -> Iterator[Known]:
        """Yield the fingerprints that have a sum at one of some places, newest first."""
        some = self._records["sums"][:, places] == value
        found = np.flatnonzero(some.any(1) & (self._records["length"] > 0))
        order = self._records["order"][found]
        for slot in found[np.argsort(order)[::-1]]:
            yield self._known(int(slot))

    def _known(self, slot: int) -> Known:
        record = self._records[slot]
        return Known(_key_of(record), int(record["block"]), record["sums"])

    def _drop(self, slot: int) -> None:
        """Remove a record."""
        record = self._records[slot]
        key = _key_of(record)
        slots = self._slots[key]
        slots.remove(slot)
        if not slots:
            del self._slots[key]
        if self._last.get(int(record["block"])) == key and key not in self._slots:
            del self._last[int(record["block"])]
        record["length"] = 0
        record["check"] = 0
        self.dropped += 1

        # Old marks are forgotten, else every place would have one in the end.
        if self._marked == _DROPPED // 8:
            self._lost = [self._lost[1], bytearray(_DROPPED)]
            self._marked = 0
        self._lost[1][crc32(key) % _DROPPED] = 1
        self._marked += 1

    def _read(self) -> None:
        """Find the records of a file, and clear those that are torn."""
        used = np.flatnonzero(self._records["check"] | self._records["length"])
        for slot in used[np.argsort(self._records["order"][used])]:
            record = self._records[slot]
            if not is_whole(record):
                record["length"] = 0
                record["check"] = 0
                self.torn += 1
                continue
            self._slots.setdefault(_key_of(record), []).append(int(slot))
            self._order = int(record["order"]) + 1
            self._next = (int(slot) + 1) % len(self._records)


def record_type(geometry: Geometry) -> np.dtype[Any]:
    """Return the type of a record: its checksum, order, the block, the length of the key + 1, the
    key and the sums."""
    fields = [("check", "<u8"), ("order", "<u8"), ("block", "<i8"), ("length", "<u8")]
    return np.dtype([*fields, ("key", "u1", (KEY,)), ("sums", "<i8", (geometry.count,))])


def is_whole(record: Any) -> bool:
    """Return whether a record of a file is in use and not torn."""
    length = int(record["length"])
    return 0 < length <= KEY + 1 and int(record["check"]) == _check_of(record)


def _key_of(record: Any) -> bytes:
    return bytes(record["key"][: int(record["length"]) - 1])


def _check_of(record: Any) -> int:
    """Return the checksum of a record, which is not 0."""
    return checksum(record.tobytes()[8:], seed=1) or 1


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
        each = {name: record_type(geometry).itemsize for name, geometry in geometries.items()}
        self.slots = nbytes // sum(each.values())
        if self.slots < 1:
            least = size_text(sum(each.values()))
            raise invalid("nbytes", f"at least {least} for a block of each group", nbytes)
        self._fd: int | None = None
        self._memory: Any = None
        if file is None:
            self.rings = {
                name: Ring(geometry, np.zeros(self.slots, record_type(geometry)), sealed=False)
                for name, geometry in geometries.items()
            }
            return
        head = _head_of(geometries, self.slots)
        begin = len(head)
        size = begin + self.slots * sum(each.values())
        self._fd = _opened(file, head, size)
        self._memory = mmap.mmap(self._fd, size)
        self.rings = {}
        for name, geometry in geometries.items():
            records = np.frombuffer(self._memory, record_type(geometry), self.slots, begin)
            begin += records.nbytes
            self.rings[name] = Ring(geometry, records, sealed=True)

    def close(self) -> None:
        """Release the file, which keeps the rings. The table has no rings then."""
        self.rings = {}
        if self._fd is not None:
            self._memory.flush()
            os.close(self._fd)  # the lock ends with it; arrays may retain the mapping
            self._fd = None


def _head_of(geometries: Mapping[str, Geometry], slots: int) -> bytes:
    """Return the first bytes of a file, padded to whole pages."""
    groups = {name: asdict(geometry) for name, geometry in geometries.items()}
    text = json.dumps({"format": _FORMAT, "slots": slots, "groups": groups}).encode()
    head = _HEAD.pack(_MAGIC, len(text), _signed(checksum(text))) + text
    return head.ljust(-(-len(head) // _ALIGNED) * _ALIGNED, b"\0")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


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
        present = os.pread(fd, len(head), 0)
        if not present.strip(b"\0"):  # new, or its maker died before the first byte
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            os.pwrite(fd, head, 0)
        else:
            _check_head(file, present, head)
            if os.fstat(fd).st_size != size:
                got = f"{os.fstat(fd).st_size} bytes"
                raise invalid("file", f"a file of {size} bytes", got, f"Delete {file}.")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_head(file: Path, present: bytes, expected: bytes) -> None:
    """Raise `InvalidTerms` unless a file begins as expected."""
    if present == expected:
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
        if magic == _MAGIC and _signed(checksum(text)) == check:
            described: dict[str, Any] = json.loads(text)
            return described
    raise InvalidTerms(
        f"Expected file to be a table of fingerprints, got {file}, which is torn or another file. "
        f"Delete it, or name another file."
    )


def read_records(file: Path) -> dict[str, tuple[Geometry, npt.NDArray[Any]]]:
    """Return the records of each group of a file, which another process may write meanwhile.

    `is_whole` says whether a record counts. Raises `InvalidTerms` as `head_text`, or OSError.
    """
    with file.open("rb") as opened:
        head = opened.read(_HEAD.size)
        length = _HEAD.unpack_from(head)[1] if len(head) == _HEAD.size else 0
        head += opened.read(max(0, min(length, 1 << 24)))
    described = head_text(file, head)
    if described["format"] != _FORMAT:
        raise invalid("file", f"a table with format {_FORMAT}", described["format"])
    begin = -(-len(head) // _ALIGNED) * _ALIGNED
    groups = dict[str, tuple[Geometry, npt.NDArray[Any]]]()
    for name, fields in described["groups"].items():
        fields["widths"] = tuple(fields["widths"])
        geometry = Geometry(**fields)
        kind = record_type(geometry)
        records = np.memmap(file, kind, "r", begin, (described["slots"],))
        begin += records.nbytes
        groups[name] = geometry, records
    return groups


def versions_in(records: npt.NDArray[Any], key: bytes) -> list[Known]:
    """Return the fingerprints of a key among the records of a file, newest first."""
    padded = np.frombuffer(key.ljust(KEY, b"\0"), np.uint8)
    same = (records["key"] == padded).all(1) & (records["length"] == len(key) + 1)
    found = [records[slot].copy() for slot in np.flatnonzero(same)]
    whole = sorted((x for x in found if is_whole(x)), key=lambda x: -int(x["order"]))
    return [Known(key, int(x["block"]), x["sums"]) for x in whole]
