# SPDX-License-Identifier: Apache-2.0
"""Strategies that move nothing but record the calls, and plans across a link that does not
exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pkgutil import resolve_name
from time import sleep
from typing import Any

import pytest
import torch

from portakv import CopyPlan, Index, KVView
from portakv.backends.base import Capabilities, Decision
from portakv.errors import Unsupported
from portakv.interconnect import choose
from portakv.interconnect.costs import DIRECTIONS, Point, Table, unmeasured
from portakv.interconnect.strategy import PAGEABLE, PINNED, Strategy

UNMEASURED = unmeasured("of a test")
CPU = torch.device("cpu")
HERE = __name__
BLOCKS = 64
SIZE = 16
ROWS = 8 * SIZE * 4  # of 256 bytes, in each block

#: Figures of an H200 on PCIe 5 x16, by strategy: fixed seconds, at least for each run, bytes in a
#: second to the host and to the device; seconds of the host: fixed, for each run, for each 32 MiB.
FIGURES: dict[str, tuple[float, float, float, float]] = {
    "staged": (18e-6, 0.12e-6, 55.0e9, 55.0e9),
    "batched_memcpy": (12e-6, 0.12e-6, 55.2e9, 55.2e9),
    "zero_copy": (10e-6, 0.0, 52.4e9, 51.2e9),
    "pageable": (60e-6, 0.1e-6, 36.0e9, 36.0e9),
}
HOST_FIGURES = {
    "staged": (90e-6, 0.45e-6, 30e-6),
    "batched_memcpy": (70e-6, 0.45e-6, 0.0),
    "zero_copy": (50e-6, 0.0, 0.0),
}


def seconds_of(strategy: str, direction: str, run_bytes: int, runs: int) -> float:
    """Return the seconds of the device by `FIGURES`."""
    fixed, per_run, down, up = FIGURES[strategy]
    return fixed + runs * max(per_run, run_bytes / (down if direction == "d2h" else up))


def host_seconds_of(strategy: str, direction: str, run_bytes: int, runs: int) -> float:
    """Return the seconds of the host by `FIGURES`."""
    if strategy not in HOST_FIGURES:
        return seconds_of(strategy, direction, run_bytes, runs)
    fixed, per_run, per_slice = HOST_FIGURES[strategy]
    return fixed + runs * per_run - (-run_bytes * runs // (32 << 20)) * per_slice


def columns_of(strategy: str, direction: str) -> dict[int, list[Point]]:
    """Return measurements that `FIGURES` would give."""
    return {
        size: [
            Point(
                runs,
                seconds_of(strategy, direction, size, runs),
                host_seconds_of(strategy, direction, size, runs),
            )
            for runs in (1 << n for n in range(17))
        ]
        for size in (1 << n for n in range(6, 26))
    }


H200 = Table(
    {},
    {(strategy, way): columns_of(strategy, way) for strategy in FIGURES for way in DIRECTIONS},
    origin="figures of a test",
)


class Fake(Strategy):
    """A strategy that records its calls."""

    places = PINNED
    prepared: list[str] = []  # noqa: RUF012 # of all strategies, in order
    launched: list[tuple[str, Any]] = []  # noqa: RUF012

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "it says so")

    def capabilities(self) -> Capabilities:
        return Capabilities(places=self.places, index_on="any")

    def prepare(self, plan: CopyPlan) -> Any:
        Fake.prepared.append(self.name)
        return lambda *arguments: Fake.launched.append((self.name, arguments))


class Staged(Fake):
    name = "staged"


class BatchedMemcpy(Fake):
    name = "batched_memcpy"


class ZeroCopy(Fake):
    """Reads int32 ids on the device, as a kernel might."""

    name = "zero_copy"

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=PINNED, index_dtypes=frozenset({torch.int32}), guards=True, skips_negative=True
        )

    def prepare(self, plan: CopyPlan) -> Any:
        sleep(0.01)  # as a compiler: other threads come by then
        return super().prepare(plan)


class Unreaching(ZeroCopy):
    """Reaches no host memory except for memory that a test marks."""

    def refuses(self, host: KVView) -> str:
        return "" if "reached" in host.derived else "it does not reach it"


class Pageable(Fake):
    name = "pageable"
    places = PAGEABLE


class Refusing(Fake):
    """Takes no plan."""

    name = "refusing"

    def check(self, plan: CopyPlan) -> Decision:
        return Decision(self.name, False, "its rows are too narrow")


class Late(Fake):
    """Takes any plan, and fails when it is prepared."""

    name = "late"

    def prepare(self, plan: CopyPlan) -> Any:
        Fake.prepared.append("late")
        raise Unsupported("This copy", "its kernel does not compile")


class Breaking(Fake):
    name = "breaking"

    def prepare(self, plan: CopyPlan) -> Any:
        raise RuntimeError("the compiler crashed")


class Absent(Fake):
    name = "absent"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, False, "its driver is not installed")


USUAL = {
    each.name: f"{HERE}:{each.__name__}" for each in (Staged, BatchedMemcpy, ZeroCopy, Pageable)
}


@contextmanager
def strategies(monkeypatch: pytest.MonkeyPatch, **targets: str) -> Iterator[None]:
    """Replace the strategies by fakes; ``zero_copy="Late"`` names another fake for it."""
    names = USUAL | {
        name: target if ":" in target else f"{HERE}:{target}" for name, target in targets.items()
    }
    Fake.prepared.clear()
    Fake.launched.clear()
    with monkeypatch.context() as patched:
        patched.setattr(choose, "strategy_class", lambda name: resolve_name(names[name]))
        yield


def put(changed: KVView, place: str) -> KVView:
    """Return the view, which then reports that its memory lies there."""
    changed.form = replace(changed.form, place=place)
    return changed


def view(place: str) -> KVView:
    """Return blocks of 16 tokens, 8 planes of 16 KiB, each block in one piece."""
    return put(
        KVView(torch.empty(BLOCKS, 4, 2, SIZE, 4, 64), "block layer kv token head dim"), place
    )


def planes(place: str) -> KVView:
    """Return the same rows head by head, 256 bytes each, and each layer in a separate
    allocation."""
    layers = [torch.empty(2, BLOCKS, 4, SIZE, 64) for _ in range(4)]
    return put(KVView(layers, "layer | kv block head token dim"), place)


def plan_of(src: KVView, dst: KVView) -> CopyPlan:
    return CopyPlan(src.form, dst.form, SIZE, SIZE)


def apart(count: int, first: int = 0) -> Index:
    """Return blocks without neighbours."""
    return Index([first + 2 * n for n in range(count)], SIZE)
