# SPDX-License-Identifier: Apache-2.0
"""Contract suites: every implementation keeps its contract, and each wrong one is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portakv.storage import Disk, Remote
from portakv_conformance.cli import main
from portakv_conformance.contract import wrong
from portakv_conformance.contract.command import CATALOGS, implementation, outcomes_of
from portakv_conformance.contract.runner import Check, Outcome, expect, run_checks
from portakv_conformance.run.journal import SubjectUnavailable

#: Further ways to make a tier.
TIERS: dict[str, Callable[[Path], Any]] = {
    "two folders": lambda folder: Disk(folder / "a", folder / "b", capacity=16 << 20),
    "disk by threads": lambda folder: Disk(folder, capacity=8 << 20, io="threads"),
    "memory": lambda folder: Remote("memory://"),
}


def failures(outcomes: list[Outcome]) -> dict[str, str]:
    return {each.name: each.failure for each in outcomes if each.failure is not None}


@pytest.mark.parametrize(
    ("contract", "name"),
    [(contract, name) for contract in CATALOGS for name in CATALOGS[contract].built_in],
)
def test_what_portakv_brings_keeps_its_contract(contract: str, name: str) -> None:
    make = implementation(contract, name)
    if contract == "transport":
        import torch

        decision = make.probe(torch.device("cpu"))  # type: ignore[attr-defined]
        if not decision.accepted:
            pytest.skip(decision.reason)
    assert failures(outcomes_of(contract, make)) == {}


@pytest.mark.parametrize("name", TIERS)
def test_other_tiers_keep_the_contract(name: str) -> None:
    assert failures(outcomes_of("tier", TIERS[name])) == {}


@pytest.mark.parametrize(
    ("contract", "name", "check"),
    [(contract, *pair) for contract, wrongs in wrong.WRONG.items() for pair in wrongs.items()],
)
def test_a_wrong_one_is_found(contract: str, name: str, check: str) -> None:
    outcomes = outcomes_of(contract, getattr(wrong, name), only=[check], soon=2.0)
    assert check in failures(outcomes)


def test_a_subject_that_hangs_or_raises_has_failed(tmp_path: Path) -> None:
    from contextlib import nullcontext
    from threading import Event

    never = Event()
    checks: list[Check[int]] = [
        Check("hangs", "", lambda subject, folder: expect(never.wait(), "")),
        Check("raises", "", lambda subject, folder: [][subject]),
        Check("holds", "", lambda subject, folder: expect(subject == 3, "it is 3")),
    ]
    outcomes = run_checks(checks, lambda folder: nullcontext(3), patience=0.2)
    never.set()
    failures = [each.failure for each in outcomes]
    assert failures[0] == "it did not end in 0.2 s"
    assert str(failures[1]).startswith("IndexError at test_contract.py:")
    assert failures[2] is None


def test_the_command_prints_each_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--contract", "io", "threads"]) == 0
    assert "io threads: 11 checks, 0 failed" in capsys.readouterr().out
    assert main(["--contract", "io", "portakv_conformance.contract.wrong:Goes", "--json"]) == 1
    outcomes = json.loads(capsys.readouterr().out)
    failed = [each["name"] for each in outcomes if each["failure"] is not None]
    assert failed == ["a_closed_engine_moves_nothing"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pigeon", "'disk' or 'remote' or 'package.module:Class'"),
        ("nowhere:Tier", "ModuleNotFoundError"),
    ],
)
def test_a_name_that_nothing_has(name: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SubjectUnavailable, match=why):
        implementation("tier", name)
    assert main(["--contract", "tier", name]) == 3
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("contract", CATALOGS)
@pytest.mark.parametrize("name", ["json:JSONDecoder", "builtins:print"])
def test_an_object_of_another_kind(
    contract: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--contract", contract, name]) == 3
    shown = capsys.readouterr()
    assert shown.out.count("failed") == 0
    assert shown.err.startswith(f"portakv conform: Expected {contract} {name!r} to ")
