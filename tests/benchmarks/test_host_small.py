# SPDX-License-Identifier: Apache-2.0
"""The benchmark of small copies: idle sends come about as those beside a large copy do."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from portakv_benchmarks.host import small as host_small
from portakv_benchmarks.host.small import Route, Seen


class Link:
    """A device and its large copy, which note what happens to them."""

    def __init__(self, samples: int) -> None:
        self.noted: list[str] = []
        self.preset = SimpleNamespace(small_samples=samples, large=1 << 30)
        self.module = SimpleNamespace(synchronize=lambda: self.noted.append("ends"))

    def pass_by(self) -> None:
        self.noted += ["large", "ends"]


WAYS = {name: Route(lambda values: torch.ones(1)) for name in ("one", "other")}


def rows_of(
    monkeypatch: pytest.MonkeyPatch, count: int, samples: int
) -> tuple[dict[str, Any], list[str], list[str]]:
    """A row, what happened behind the warm-up, and whose every send was."""
    link = Link(samples)
    whose: list[str] = []
    names = {id(way): name for name, way in WAYS.items()}

    def send(
        bench: Any, way: Any, count: int, n: int, large: Any = None, flies: bool = False
    ) -> Any:
        if large is not None:
            link.noted.append("large" if flies else "short")
        link.noted.append("send")
        whose.append(names[id(way)])
        return Seen(9.0 if flies else 5.0 if large is None else 6.0, 1.0, 2.0, flies), True

    monkeypatch.setattr(host_small, "_send", send)
    bench: Any = link
    sends = host_small._Sends(bench, WAYS, count, bench)
    row = host_small._row(bench, "one", count, sends.seen["one"], sends.right["one"])
    warm = host_small._WARM_UP * len(WAYS)
    return row, link.noted[warm:], whose[warm:]


def test_only_the_copy_in_flight_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    row, noted, _ = rows_of(monkeypatch, 64, 31)
    idle = host_small._TURNS * 2 * 31
    assert noted[: 1 + 2 * idle] == ["ends"] + ["send", "ends"] * idle
    noted = noted[2 * idle :]
    sends = [at for at, what in enumerate(noted) if what == "send"]
    assert len(sends) == 2 * 62
    before = [noted[at - 2 : at + 1] for at in sends]
    assert before == [["ends", "short", "send"], ["ends", "large", "send"]] * 62
    for at in sends:  # what ended last was a large copy
        behind = [what for what in noted[: at - 1] if what in ("large", "short")]
        assert behind[-1] == "large"
    assert (row["samples"], row["overtook"], row["busy_to_idle"]) == (31, 31, 1.5)
    assert (row["idle_us"], row["paced_us"], row["busy_us"]) == (5.0, 6.0, 9.0)
    assert row["idle_samples"] == host_small._TURNS * 31
    assert "has ended" in row["cadence"]


def test_the_ways_take_turns_of_many_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    whose = rows_of(monkeypatch, 64, 31)[2]
    turn = ["one"] * 31 + ["other"] * 31
    assert whose[: host_small._TURNS * 62] == turn * host_small._TURNS


def test_counts_without_a_bar_take_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(monkeypatch, 1000, 31)[0]["samples"] == 10
    assert rows_of(monkeypatch, 1, 2)[0]["samples"] == 1


def test_the_other_copy_is_short_or_large() -> None:
    """And the short one has ended when the send begins."""
    queries: list[bool] = []

    def query() -> bool:
        queries.append(len(queries) >= 3)
        return queries[-1]

    ended = SimpleNamespace(record=lambda stream: None, query=query)
    for flies, moved in ((False, host_small._SHORT), (True, 100_000)):
        large = object.__new__(host_small._Large)
        large._module = SimpleNamespace(stream=lambda stream: nullcontext())
        large._stream, large._ended = None, ended  # type: ignore[assignment]
        large._source = torch.ones(100_000, dtype=torch.uint8)
        large._target = torch.zeros(100_000, dtype=torch.uint8)
        queries.clear()
        large.start(flies)
        assert int(large._target.sum()) == moved
        assert queries == ([False] if flies else [False, False, False, True])
