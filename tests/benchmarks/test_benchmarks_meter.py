# SPDX-License-Identifier: Apache-2.0
"""The comparison for the figures of docs/operations.md: its turns, and what is added."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from portakv_benchmarks.shared import meter

CHEAP = 1.0
DEAR = 3.0


def test_what_is_switched_on_is_what_is_added() -> None:
    """The fastest turn of each kind counts, and the switch is off at the end."""
    switched = [False]
    now = [0.0]
    calls = {False: 0, True: 0}

    def switch(on: bool) -> None:
        switched[0] = on

    def call() -> None:
        on = switched[0]
        calls[on] += 1
        slow = 5.0 if calls[on] < 7 else 0.0  # other work of the machine, in the first turns
        now[0] += slow + (DEAR if on else CHEAP)

    result = meter.compare(
        call, switch, calls=2, turns=4, processor=lambda: now[0], clock=lambda: now[0]
    )
    assert calls == {False: 12, True: 12}  # a call before each turn is not measured
    assert not switched[0]
    assert (result["seconds"], result["elapsed"]) == (CHEAP, CHEAP)
    assert (result["added"], result["elapsed_added"]) == (DEAR - CHEAP, DEAR - CHEAP)
    assert result["share"] == (DEAR - CHEAP) / CHEAP


def test_spans_of_a_pull_are_measured() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    result = meter.spans(2, calls=1, turns=1)
    assert result["seconds"] > 0
    assert result["elapsed"] > 0


@pytest.mark.parametrize(
    ("name", "share", "begins"),
    [
        ("copy_rows, counted", 0.007, "met"),
        ("copy_rows, counted", 0.018, "accepted: 0.17 us"),
        ("copy_rows, counted", 0.019, "missed"),
        ("offer and pull of 128 KiB, with spans", 0.17, "accepted: 43 us"),
        ("offer and pull of 128 KiB, with spans", 0.21, "missed"),
        ("offer and pull of 128 MiB, with spans", 0.011, "missed"),
        ("reading", 0.5, "missed"),
    ],
)
def test_a_miss_of_the_target_is_accepted_up_to_its_share(
    name: str, share: float, begins: str
) -> None:
    assert meter.verdict(name, share).startswith(begins)


def test_the_page_states_each_accepted_miss() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert len(meter.ACCEPTED) == 2
    for accepted in meter.ACCEPTED.values():
        for figure in re.findall(r"\d[\d.]* (?:us|ms|%)", accepted.reason):
            assert figure in page, figure
    assert f"the target, {meter.TARGET:.0%}".replace("%", " %") in page
