# SPDX-License-Identifier: Apache-2.0
"""The table of fingerprints is bounded, and its file survives a restart and a torn write."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.witness_cases import key

from portakv.errors import InvalidTerms
from portakv.witness.fingerprint import Geometry
from portakv.witness.table import (
    VERSIONS,
    Ring,
    Table,
    read_file,
    record_bytes,
)

GEOMETRY = Geometry(2, 2, 2, 4, 4, (16, 16), 4)
OTHER = Geometry(1, 1, 1, 16, 0, (64,), 4)
RECORD = record_bytes(GEOMETRY)


def sums(*numbers: int, geometry: Geometry = GEOMETRY) -> np.ndarray:
    """Return fingerprints that differ in every sum."""
    rows = [np.random.default_rng(n).integers(-(2**62), 2**62, geometry.count) for n in numbers]
    return np.array(rows, np.int64).reshape(len(numbers), -1)


@contextmanager
def opened(path: Path | None, slots: int = 6, **groups: Geometry) -> Iterator[Table]:
    groups = groups or {"": GEOMETRY}
    nbytes = slots * sum(record_bytes(each) for each in groups.values())
    table = Table(groups, nbytes, path)
    try:
        yield table
    finally:
        table.close()


@pytest.fixture(params=[False, True], ids=["memory", "file"])
def ring(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ring]:
    with opened(tmp_path / "table" if request.param else None) as table:
        yield table.rings[""]


def add(ring: Ring, *numbers: int) -> None:
    ring.add([key(n) for n in numbers], [*numbers], sums(*numbers))


def test_the_oldest_fingerprints_are_evicted(ring: Ring) -> None:
    for first in range(0, 20, 4):
        add(ring, *range(first, first + 4))
    assert len(ring) == 6
    assert ring.dropped == 14
    for n in range(20):
        assert (key(n) in ring.keys) == (n >= 14)
        assert [x.sums.tolist() for x in ring.versions(key(n))] == sums(n).tolist() * (n >= 14)
        assert ring.was_dropped(key(n)) == (n < 14)


def test_a_call_with_more_blocks_than_the_table_keeps_the_last(ring: Ring) -> None:
    add(ring, *range(15))
    assert [n for n in range(15) if key(n) in ring.keys] == [*range(9, 15)]


def test_versions_are_newest_first_and_bounded() -> None:
    with opened(None, slots=20) as table:
        ring = table.rings[""]
        for n in range(VERSIONS + 3):
            ring.add([key(0)], [n], sums(n))
            ring.add([key(0)], [n], sums(n))  # known already
        expected = sums(*range(VERSIONS + 2, 3, -1), 0).tolist()
        assert [x.sums.tolist() for x in ring.versions(key(0))] == expected
        assert ring.dropped == 3
        assert ring.was_dropped(key(0))


def test_a_version_that_is_stored_again_is_the_newest(tmp_path: Path) -> None:
    for path in (None, tmp_path / "fingerprints"):
        with opened(path) as table:
            ring = table.rings[""]
            for n in (1, 2, 1):
                ring.add([key(0)], [0], sums(n))
            assert [x.sums.tolist() for x in ring.versions(key(0))] == sums(1, 2).tolist()
            assert ring.agree([key(0)], sums(1)) == [True]
            assert ring.agree([key(0)], sums(2)) == [False]
    with opened(tmp_path / "fingerprints") as table:
        ring = table.rings[""]
        assert [x.sums.tolist() for x in ring.versions(key(0))] == sums(1, 2).tolist()
        assert ring.torn == 0


def test_only_lost_keys_are_marked() -> None:
    with opened(None) as table:
        ring = table.rings[""]
        ring.lose(b"lost %d" % n for n in range(120_000))
        # A few have the place of a later one.
        assert sum(ring.was_dropped(b"lost %d" % n) for n in range(100_000, 120_000)) > 19_000
        assert not any(ring.was_dropped(b"other %d" % n) for n in range(10_000))


def test_keys_agree_in_any_order(ring: Ring) -> None:
    assert ring.agree([], sums(1)[:0]) == []
    add(ring, *range(4))
    numbers = [3, 0, 9, 2, 2]
    assert ring.agree([key(n) for n in numbers], sums(*numbers)) == [True, True, False, True, True]
    assert ring.agree([key(0), key(1), key(2)], sums(0, 5, 2)) == [True, False, True]


def test_the_rows_of_engine_blocks_are_followed(ring: Ring) -> None:
    add(ring, 1, 2, 3)
    assert ring.key_in(2) == key(2)
    ring.rest([2], [key(3)])
    assert ring.key_in(2) == key(3)
    ring.forget([2, 9])
    assert ring.key_in(2) is None


def test_each_group_has_the_same_number_of_fingerprints() -> None:
    with opened(None, slots=7, a=GEOMETRY, b=OTHER) as table:
        assert table.slots == 7
        table.rings["b"].add([key(1)], [0], sums(1, geometry=OTHER))
        assert key(1) not in table.rings["a"].keys


def test_fewer_bytes_than_a_block_are_refused() -> None:
    with pytest.raises(InvalidTerms, match=f"nbytes.* at least {RECORD} B"):
        Table({"": GEOMETRY}, RECORD - 1)


# The file


def test_fingerprints_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with opened(path) as table:
        add(table.rings[""], *range(8))
    with opened(path) as table:
        ring = table.rings[""]
        assert len(ring) == 6
        assert ring.versions(key(7))[0].sums.tolist() == sums(7)[0].tolist()
        add(ring, 8)  # the oldest is evicted, as before the restart
        assert [n for n in range(9) if key(n) in ring.keys] == [*range(3, 9)]


@pytest.mark.parametrize("count", [4, 6])
def test_a_version_that_was_stored_again_keeps_its_place_after_a_restart(
    tmp_path: Path, count: int
) -> None:
    """A new fingerprint takes a free place if there is one, else that of the oldest."""
    path = tmp_path / "table"
    with opened(path) as table:
        ring = table.rings[""]
        add(ring, *range(count - 1))
        ring.add([key(2)], [2], sums(20))
        add(ring, 2)
    with opened(path) as table:
        ring = table.rings[""]
        add(ring, 8)
        assert ring.dropped == (count == 6)
        assert [n for n in range(9) if key(n) in ring.keys] == [
            *range(count == 6, count - 1),
            8,
        ]
        assert [x.sums.tolist() for x in ring.versions(key(2))] == sums(2, 20).tolist()


def test_fingerprints_survive_a_process_that_dies(tmp_path: Path) -> None:
    """Nothing closes the first table; its file is read while it is open."""
    with opened(tmp_path / "table") as table:
        add(table.rings[""], 1, 2)
        ring = read_file(tmp_path / "table")[""]
        assert ring.geometry == GEOMETRY
        (known,) = ring.versions(key(2))
        assert known.sums.tolist() == sums(2)[0].tolist()
        assert not ring.versions(key(3))


@pytest.mark.parametrize("at", [8, 16, 24, 32, 63, "sums", "none"])
def test_a_torn_record_is_left_out(tmp_path: Path, at: int | str) -> None:
    """A byte of one record differs; "none" is the negative control."""
    path = tmp_path / "table"
    with opened(path) as table:
        add(table.rings[""], *range(6))
    data = bytearray(path.read_bytes())
    heads = len(data) - 6 * RECORD
    head = RECORD - GEOMETRY.nbytes
    if at == "sums":
        data[heads + 6 * head + 2 * GEOMETRY.nbytes + 5] ^= 1
    elif isinstance(at, int):
        data[heads + 2 * head + at] ^= 1
    path.write_bytes(data)
    with opened(path) as table:
        ring = table.rings[""]
        assert ring.torn == (at != "none")
        assert [n for n in range(6) if key(n) in ring.keys] == [
            n for n in range(6) if n != 2 or at == "none"
        ]


def test_a_torn_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(b"another file")
    with pytest.raises(InvalidTerms, match=r"torn or another file\. Delete it"), opened(path):
        pass
    path.unlink()
    with opened(path):
        pass
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InvalidTerms, match=f"a file of {len(data)} bytes"), opened(path):
        pass
    path.write_bytes(data[:40] + b"x" + data[41:])
    with pytest.raises(InvalidTerms, match="torn or another file"), opened(path):
        pass
    assert path.read_bytes() == data[:40] + b"x" + data[41:]


def test_a_file_whose_maker_died_before_the_first_byte_is_new(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_bytes(bytes(5000))
    with opened(path) as table:
        add(table.rings[""], 1)
    with opened(path) as table:
        assert key(1) in table.rings[""].keys


def test_other_groups_and_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with opened(path):
        pass
    with pytest.raises(InvalidTerms, match="a table with groups"), opened(path, a=OTHER):
        pass
    with pytest.raises(InvalidTerms, match=r"with slots 7, got 6\. Pass the nbytes of before"):
        Table({"": GEOMETRY}, 7 * RECORD, path)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_has_space_for_all_fingerprints(tmp_path: Path, new: bool) -> None:
    """A write to mapped memory without space would be a SIGBUS. A copy may have holes."""
    path = tmp_path / "table"
    slots = 100
    if not new:
        with opened(path, slots):
            pass
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[: -50 * RECORD])
        os.truncate(path, len(data))
    with opened(path, slots):
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_a_file_without_space_is_refused_and_leaves_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "table"
    (soft, hard) = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, hard))
    try:
        with pytest.raises(InvalidTerms, match=r"with space for .*pass fewer nbytes"):
            Table({"": GEOMETRY}, 1000 * RECORD, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 0
    with opened(path):  # the control
        pass


def test_two_processes_cannot_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with opened(path), pytest.raises(InvalidTerms, match="that no other witness has"):
        Table({"": GEOMETRY}, 6 * RECORD, path)
    with opened(path):  # the control
        pass


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTerms, match="a file that can be written"):
        Table({"": GEOMETRY}, RECORD, tmp_path / "no folder" / "table")
