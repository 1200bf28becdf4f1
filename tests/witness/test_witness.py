# SPDX-License-Identifier: Apache-2.0
"""A witness chooses blocks by their keys, waits for nothing until it is read, and acts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import pytest
import torch
from support.device_cases import delay
from support.witness_cases import BLOCKS, Engine, key

from portakv import KVView
from portakv.errors import InvalidTerms, LayoutError, SlotError, TransferError, Unsupported
from portakv.witness import Witness, WrongRows
from portakv.witness.table import HEAD
from portakv.witness.witness import Figures

WRONG = 20


def with_fault(engine: Engine, number: int = 0) -> Engine:
    """Store a block and restore it with a changed number."""
    engine.store([number], [number])
    engine.load(WRONG, number)
    engine.cache[0][0, WRONG, 0, 0, 0] += 1
    return engine


# Which blocks


@pytest.mark.parametrize("rate", [0, 1 / 16, 1 / 2, 1])
def test_equal_keys_are_chosen_alike(rate: float) -> None:
    engine = Engine(check="sample", rate=rate)
    numbers = range(BLOCKS)
    engine.store(numbers, numbers)
    engine.witness.settle(wait=True)
    chosen = [n for n in numbers if crc32(key(n)) < rate * 2**32]
    assert engine.witness.figures()[""].fingerprinted == len(chosen)
    engine.witness.restored([*numbers], [key(n) for n in numbers]).faults  # noqa: B018 - settles
    figures = engine.witness.figures()[""]
    assert (figures.compared, figures.unknown, figures.faults) == (len(chosen), 0, {})


def test_a_rate_of_a_sixteenth_chooses_about_a_sixteenth() -> None:
    limit = 2**32 / 16
    assert 0.05 < sum(crc32(key(n)) < limit for n in range(4000)) / 4000 < 0.075


def test_first_blocks_are_compared_whatever_the_rate() -> None:
    """In the control the block is not the first of a request."""
    for first, found in (([0], 1), ([], 0)):
        engine = Engine(check="sample", rate=0)
        engine.store([0], [0], first=first)
        engine.load(WRONG, 0)
        engine.cache[0][0, WRONG, 0, 0, 0] += 1
        assert len(engine.witness.restored([WRONG], [key(0)]).faults) == found


def test_a_sampled_key_has_all_its_versions() -> None:
    """Another request computes a block again, which is not its first. In the control the rows of
    the load are neither version."""
    for right in (True, False):
        engine = Engine(check="sample", rate=0)
        engine.store([0], [0], first=[0])
        other = [rows + 1 for rows in engine.rows(0)]
        engine.write(1, other)
        engine.witness.stored([1], [key(0)])
        engine.write(WRONG, other if right else [rows + 2 for rows in other])
        assert bool(engine.witness.restored([WRONG], [key(0)]).faults) is not right


@pytest.mark.parametrize("differs", ["all", "half"])
@pytest.mark.parametrize("seen", [True, False])
def test_a_version_that_was_not_chosen_is_no_fault(seen: bool, differs: str) -> None:
    """A tier has the rows of a request that computed other blocks before, and the first block of
    another request is the same. In the control the witness has not seen the former request."""
    engine = Engine(check="sample", rate=0)
    engine.store([0], [0])
    later = [rows.clone() for rows in engine.rows(0)]
    for rows in later:
        rows[:, 8 if differs == "half" else 0 :] += 1
    if not seen:
        engine.witness = Witness(engine.view, check="sample", rate=0)
    engine.write(1, later)
    engine.witness.stored([1], [key(0)], first=[0])
    engine.load(WRONG, 0)
    assert bool(engine.witness.restored([WRONG], [key(0)]).faults) is not seen
    assert engine.witness.figures()[""].compared == (not seen)


def test_a_first_block_is_taken_wherever_a_call_has_its_key() -> None:
    """Two requests of a step compute it, and a tier has the rows of either. In the control a number
    has changed."""
    engine = Engine(check="sample", rate=0)
    engine.witness.stored([0, 1], [key(0)] * 2, first=[0])
    for block in (0, 1):
        engine.write(WRONG, engine.rows(block))
        assert not engine.witness.restored([WRONG], [key(0)]).faults
    engine.cache[0][0, WRONG, 0, 0, 0] += 1
    assert engine.witness.restored([WRONG], [key(0)]).faults


@pytest.mark.parametrize("check", ["sample", "all"])
def test_a_key_that_is_not_chosen_is_named_if_it_is_wrong(check: str) -> None:
    engine = Engine(check=check, rate=0)
    wrong: Any = bytearray(b"key")
    for call in (engine.witness.stored, engine.witness.restored):
        with pytest.raises(InvalidTerms, match="keys"):
            call([0], [wrong])


def test_keys_that_are_not_known_are_counted() -> None:
    engine = Engine()
    assert not engine.witness.restored([1, 2], [key(1), key(2)]).faults
    assert engine.witness.figures() == {"": Figures(unknown=2)}
    engine.witness.stored([1], [key(1)])
    assert not engine.witness.restored([1, 2], [key(1), key(2)]).faults
    assert engine.witness.figures() == {"": Figures(fingerprinted=1, compared=1, unknown=3)}


def test_fingerprints_that_were_evicted_are_counted() -> None:
    engine = Engine(nbytes=3 * (HEAD.itemsize + Engine().witness.block_bytes[""]))
    engine.store(range(5), range(5))
    assert not engine.witness.restored([0, 4], [key(0), key(4)]).faults
    figures = engine.witness.figures()[""]
    assert (figures.compared, figures.unknown, figures.dropped) == (1, 1, 2)


def test_off_does_nothing() -> None:
    engine = with_fault(Engine(check="off", file="/no folder/table"))
    result = engine.witness.restored([WRONG], [key(0)])
    assert (result.is_done, result.faults, result.failed) == (True, [], set())
    assert not engine.witness.figures()
    assert not engine.witness.block_bytes


def test_fingerprints_are_a_small_part_of_a_block() -> None:
    cache = [torch.empty(2, 1, 16, 8, 128, dtype=torch.bfloat16) for _ in range(32)]
    witness = Witness(KVView(cache, "layer | kv block token head dim"))
    assert witness.block_bytes[""] == 12288 == (2 << 20) * 3 // 512


# What happens on a fault


@pytest.mark.parametrize("action", ["log", "recompute", "raise"])
def test_the_action_decides(action: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = with_fault(Engine(action=action))
    result = engine.witness.restored([WRONG, 0], [key(0), key(0)])
    if action == "raise":
        for _ in range(2):
            with pytest.raises(WrongRows, match=f"Wrong rows in block {WRONG}") as raised:
                result.failed  # noqa: B018 - raises
            assert isinstance(raised.value, TransferError)
            assert [fault.block for fault in raised.value.faults] == [WRONG]
    else:
        assert [fault.block for fault in result.faults] == [WRONG]
        assert result.failed == ({WRONG} if action == "recompute" else set())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"Wrong rows in block {WRONG}, key {key(0).hex()[:16]}" in record.message
    assert ("The engine computes the block again." in record.message) == (action == "recompute")


def test_one_line_is_logged_for_each_kind_of_fault(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.store(range(6), range(6))
    for at in range(6):
        engine.load(WRONG + at, at)
        engine.cache[0][0, WRONG + at, 0, 0, 0] += 1
    for layer in engine.cache:
        layer[:, WRONG + 5] = 0
    blocks = [WRONG + at for at in range(6)]
    assert len(engine.witness.restored(blocks, [key(at) for at in range(6)]).faults) == 6
    assert len(caplog.records) == 2


def test_a_comparison_that_nobody_reads_is_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = with_fault(Engine())
    engine.witness.restored([WRONG], [key(0)])
    engine.witness.stored([1], [key(1)])
    assert engine.witness.figures()[""].faults == {"changed bytes": 1}
    assert "Wrong rows" in caplog.text


def test_comparisons_that_nobody_reads_do_not_pile_up(caplog: pytest.LogCaptureFixture) -> None:
    """A caller that only loads is told of a fault too."""
    engine = with_fault(Engine())
    for _ in range(300):
        engine.witness.restored([WRONG], [key(0)])
    assert engine.witness.figures()[""].faults["changed bytes"] > 200
    assert "Wrong rows" in caplog.text


def test_a_callers_lists_may_be_used_again() -> None:
    engine = with_fault(Engine())
    blocks = torch.tensor([WRONG])
    keys = [key(0)]
    comparison = engine.witness.restored(blocks, keys)
    blocks.fill_(3)
    keys.clear()
    assert [(x.block, x.key) for x in comparison.faults] == [(WRONG, key(0))]


def test_close_settles_and_ends_the_checks(tmp_path: Path) -> None:
    engine = with_fault(Engine(file=tmp_path / "table"))
    result = engine.witness.restored([WRONG], [key(0)])
    engine.witness.close()
    engine.witness.close()
    assert len(result.faults) == 1
    engine.witness.stored([1], [key(1)])
    assert not engine.witness.restored([WRONG], [key(0)]).faults
    # The fingerprints are there after the restart.
    again = Engine(file=tmp_path / "table")
    assert len(again.witness.restored([WRONG], [key(0)]).faults) == 1


# Wrong arguments

ARGUMENTS: dict[str, tuple[Callable[[Witness], object], type[Exception], str]] = {
    "keys": (lambda w: w.stored([1, 2], [key(1)]), InvalidTerms, "a key for each of 2 blocks"),
    "text": (
        lambda w: w.stored([1], cast("list[bytes]", ["a"])),
        InvalidTerms,
        "bytes, at most 64",
    ),
    "long": (lambda w: w.restored([1], [bytes(65)]), InvalidTerms, "bytes, at most 64"),
    "group": (lambda w: w.stored([1], [key(1)], "x"), InvalidTerms, "Expected group to be ''"),
    "blocks": (lambda w: w.stored([1, BLOCKS], [key(1)] * 2), SlotError, "blocks from 0 to 39"),
    "type": (lambda w: w.stored(cast("list[int]", [1.5]), [key(1)]), SlotError, "Expected blocks"),
}


@pytest.mark.parametrize("check", ["all", "sample"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_named(case: str, check: str) -> None:
    (call, error, text) = ARGUMENTS[case]
    with pytest.raises(error, match=text):
        call(Engine(check=check, rate=1).witness)


TERMS: dict[str, tuple[dict[str, Any], str]] = {
    "check": ({"check": "some"}, "Expected check to be 'off' or 'sample' or 'all'"),
    "action": ({"action": "stop"}, "Expected action to be 'log'"),
    "rate": ({"rate": 2}, "Expected rate to be a number from 0 to 1"),
    "nbytes": ({"nbytes": 10}, "Expected nbytes to be at least"),
    "older": ({"older": "no"}, "Expected older to be 'accept'"),
    "ranks": ({"ranks": 0}, "Expected ranks to be a whole number of at least 1"),
    "rank": ({"rank": 2, "ranks": 2}, "Expected rank to be a whole number of at most 1"),
    "shardings": ({"shardings": ["f"]}, "Expected shardings to be a list of paths"),
    "shard": ({"shardings": [[""]]}, "Expected shardings to be a path"),
    "ranks' files": ({"shardings": [[]]}, "Expected shardings to be the files of all ranks"),
}


@pytest.mark.parametrize("case", TERMS)
def test_wrong_terms_are_named(case: str) -> None:
    (terms, text) = TERMS[case]
    with pytest.raises(InvalidTerms, match=text):
        Engine(**terms)


def test_a_group_without_fingerprints_is_named_at_the_start() -> None:
    views = {
        "full": KVView(torch.zeros(5, 4, 8), "block token dim"),
        "chunk": KVView(torch.zeros(5, 8), "token dim"),
    }
    with pytest.raises(LayoutError, match=r"Group 'chunk' has no fingerprints\. Expected a paged"):
        Witness(views)
    Witness({"full": views["full"]})
    with pytest.raises(InvalidTerms, match="views"):
        Witness({})
    with pytest.raises(InvalidTerms, match="views"):
        Witness({"full": torch.zeros(3)})  # type: ignore[dict-item]


# Devices


@pytest.mark.gpu
def test_nothing_waits_for_a_device_until_it_is_read() -> None:
    engine = with_fault(Engine("cuda"))
    engine.witness.restored([WRONG], [key(0)]).faults  # noqa: B018 - builds and warms up
    stream = torch.cuda.current_stream()
    delay(stream)
    engine.witness.stored([1], [key(1)])
    result = engine.witness.restored([WRONG], [key(0)])
    assert not result.is_done
    assert not stream.query()
    assert len(result.faults) == 1
    assert result.is_done


@pytest.mark.gpu
def test_fingerprints_follow_the_current_stream() -> None:
    engine = Engine("cuda")
    side = torch.cuda.Stream()
    rows = [torch.randn(each.shape).to(each) for each in engine.rows(0)]
    with torch.cuda.stream(side):
        delay(side)
        engine.write(0, rows)
        engine.witness.stored([0], [key(0)])
        engine.write(WRONG, rows)
        result = engine.witness.restored([WRONG], [key(0)])
    assert not result.is_done
    assert not result.faults
    assert engine.witness.figures()[""].compared == 1


@pytest.mark.gpu
def test_a_graph_capture_is_refused() -> None:
    engine = Engine("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(Unsupported, match="fingerprints"):
        engine.witness.stored([0], [key(0)])


@pytest.mark.gpu
def test_a_device_has_the_table_of_the_host(tmp_path: Path) -> None:
    """A file of a device serves a host whose rows are the same."""
    there = Engine("cuda", file=tmp_path / "table")
    there.store(range(4), range(4))
    there.witness.close()
    here = Engine("cpu", file=tmp_path / "table")
    here.write(WRONG, [rows.cpu() for rows in there.saved[key(2)]])
    assert not here.witness.restored([WRONG], [key(2)]).faults
    assert len(here.witness.restored([WRONG], [key(3)]).faults) == 1
