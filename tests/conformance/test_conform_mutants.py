# SPDX-License-Identifier: Apache-2.0
"""The mutants: each is a backend with one bug, and the base that they share has none."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings

from portakv import CopyPlan, Index, KVView
from portakv.backends.base import Backend
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.judging import index_of, view_of
from portakv_conformance.mutants import CONTROLS, MUTANTS, Mutant
from portakv_conformance.mutants.base import HostRows
from portakv_conformance.mutants.cells import IllegalAddress, load, store
from portakv_conformance.mutants.trial import fails_self_check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mutants.md"
HOST = torch.device("cpu")
#: What has to be seeded at the least.
ASKED = {
    "off-by-one-slot", "swapped-keys-and-values", "swapped-layers", "thirty-two-bit-offset",
    "ignored-stride", "ignored-storage-offset", "tokens-before-heads", "tail-overrun",
    "last-vector-dropped", "negative-is-last-row", "rounded-to-eight", "padding-overwritten",
    "wrong-stream", "no-wait-on-producer", "temp-freed-early", "int32-read-as-int64",
    "start-ignored", "only-first-block-size", "block-ids-as-slots", "unequal-widths-mixed",
    "nans-canonical", "stale-pointer-table", "status-ignored", "duplicates-past-the-end",
    "current-device-only", "partial-block-dropped", "grid-clipped", "indices-of-the-first-call",
    "claims-guards", "error-after-partial-write", "table-of64", "table-of256",
    "blocks-in-thirty-two-bits", "migrations-in-thirty-two-bits", "migrations-clipped",
    "guards-source-only", "far-chunk-on-the-device", "far-planes-on-the-device",
    "waits-in-the-launch",
}  # fmt: skip


def class_of(mutant: Mutant) -> type[HostRows]:
    module, _, name = mutant.target.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    assert issubclass(found, HostRows)
    return found


def moved_by(backend: Backend, case: Case) -> None:
    """Carry a case out by the backend's launch alone, unit by unit of one token or page."""
    src, dst = view_of(case.src), view_of(case.dst)
    mine, theirs = index_of(case.src), index_of(case.dst)
    unit = src.block_size if src.opaque else 1
    plan = CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step, unit)
    pending = backend.prepare(plan)(src, dst, mine, theirs, case.count, None, None)
    if pending is not None:
        pending.wait()


def test_there_are_enough_and_each_has_its_own_name() -> None:
    assert ASKED <= {mutant.name for mutant in MUTANTS}
    for field in ("name", "target", "bug"):
        assert len({getattr(mutant, field) for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_a_small_backend_with_a_sentence(mutant: Mutant) -> None:
    found = class_of(mutant)
    assert mutant.name == found.name
    assert mutant.bug.endswith(".")
    assert mutant.bug[0].isupper()
    assert len(inspect.getsource(found).splitlines()) <= 30
    assert mutant.profile in ("core", "full")
    assert mutant.device in ("cpu", "simdev")
    decision = found.probe(torch.device("meta"))
    assert not decision.accepted
    assert mutant.device in decision.reason


@settings(max_examples=150)
@given(all_cases())
def test_the_unmutated_base_is_right(case: Case) -> None:
    case.check(lambda: moved_by(HostRows(HOST), case))


def test_the_self_check_turns_some_down() -> None:
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    assert not fails_self_check(CONTROLS[0])
    for name in ("off-by-one-slot", "swapped-layers", "tail-overrun"):
        assert fails_self_check(by_name[name]), name


@pytest.mark.parametrize(
    "name", ["off-by-one-slot", "ignored-storage-offset", "one-unit-forgotten", "claims-skipping"]
)
def test_a_mutant_is_wrong_where_the_base_is_right(name: str) -> None:
    backend = class_of(next(mutant for mutant in MUTANTS if mutant.name == name))(HOST)

    @settings(max_examples=100, database=None, phases=(Phase.generate,))
    @given(all_cases())
    def holds(case: Case) -> None:
        case.check(lambda: moved_by(backend, case))

    with pytest.raises(AssertionError, match="Destination"):
        holds()


def test_the_base_guards_and_names_the_first_bad_position() -> None:
    cache, chunk = torch.arange(40, dtype=torch.int16).view(5, 2, 4), torch.full((4, 4), -1)
    chunk = chunk.to(torch.int16)
    src, dst = KVView(cache, "block token dim"), KVView(chunk, "token dim")
    index = Index(torch.tensor([3, 10, 2**62, -1]))
    plan = CopyPlan(src.form, dst.form, 1, 0)
    status = torch.zeros(1, dtype=torch.int64)
    HostRows(HOST).prepare(plan)(src, dst, index, Index(), 4, None, status)
    assert status.item() == 2
    assert torch.equal(chunk[0], cache.view(10, 4)[3])
    assert bool((chunk[1:] == -1).all())


def test_memory_ends_where_the_buffers_end() -> None:
    tensor = torch.arange(64, dtype=torch.uint8)
    view = KVView(tensor.view(4, 16), "token dim")
    base = np.array([tensor.data_ptr()], dtype=np.int64)
    assert load(view, base + 48, 16, 16).tobytes() == bytes(range(48, 64))
    store(view, base + 2, np.array([[7, 8]], dtype=np.uint8))
    assert tensor[:5].tolist() == [0, 1, 7, 8, 4]
    # Where accesses are 8 bytes wide the low bits of an address are lost.
    assert load(view, base + 21, 8, 8).tobytes() == bytes(range(16, 24))
    for at in (-1, 57, 2**40):
        with pytest.raises(IllegalAddress, match="leave the buffers"):
            load(view, base + at, 8, 1)


def test_the_page_tells_of_every_mutant_and_of_no_survivor() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "survives**" not in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    told = {tuple(cell.strip(" `") for cell in row.split("|")[1:3]) for row in rows}
    assert told == {(mutant.name, mutant.bug) for mutant in MUTANTS}, (
        "docs/mutants.md is stale; run python -m portakv_conformance.mutants.score --write "
        "docs/mutants.md"
    )
