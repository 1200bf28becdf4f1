# SPDX-License-Identifier: Apache-2.0
"""The cases of the suite. Each test's docstring is a sentence of the specification of a backend.

`test_core` is what every backend must do. The other files widen it: layouts and shapes
(`test_corners`, `test_presets`, `test_indices`, `test_parts`), what callers do (`test_connector`),
what must never happen (`test_safety`, `test_far`), what a backend claims (`test_claims`,
`test_lies`), order, devices and graphs (`test_ordering`, `test_devices`, `test_capture`), and
random structures (`test_drawn`, `test_metamorphic`, `test_stateful`), and rows that change on the
way: packed (`test_encodings`), rounded (`test_fp8`), and keys that are rotated (`test_rope`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from portakv import AdaptiveConnector
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.by_hand import CHUNK, DIRECTIONS, PAGED, Shape, Workshop, between
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, arguments_of, index_of, plan_of, view_of
from portakv_conformance.judge.subject import Subject

__all__ = [
    "AREAS",
    "BOTH",
    "CHUNK",
    "DIRECTIONS",
    "PAGED",
    "Bench",
    "Case",
    "Facility",
    "Judge",
    "Shape",
    "Side",
    "Subject",
    "Workshop",
    "arguments_of",
    "between",
    "full",
    "index_of",
    "plan_of",
    "view_of",
]

AREAS = (
    "core",
    "corners",
    "safety",
    "claims",
    "metamorphic",
    "ordering",
    "capture",
    "stateful",
    "drawn",
    "encodings",
)
#: A case of the profile ``full`` only.
full = pytest.mark.profile("full")
#: The directions as a parameter that comes where the mark stands; the fixture's comes first.
BOTH = pytest.mark.parametrize("direction", DIRECTIONS)


@dataclass(frozen=True)
class Bench(Workshop):
    """Makes the copies of a case of the suite, and has them judged."""

    judge: Judge = field(kw_only=True)

    @property
    def subject(self) -> Subject:
        """Return the backend under test."""
        return self.judge.subject

    @property
    def facility(self) -> Facility:
        """Return streams and delays of the judged device."""
        return self.judge.facility

    def other(self, number: int) -> Bench:
        """Return a bench with other bytes and other shuffled lists, by a number."""
        return replace(self, seed=self.seed + number)

    def on_device(self, *shuffled: int) -> torch.Tensor:
        """Return shuffled ids on the judged device."""
        return torch.tensor(self.shuffled(*shuffled)).to(self.device)

    def connector(self) -> AdaptiveConnector:
        """Return a connector for the judged backend, in layouts that the backend takes."""
        return AdaptiveConnector(
            self.subject.device,
            backend=self.subject.name,
            kv_layout=self.paged,
            chunk_layout=self.dense,
        )

    def copy(self, case: Case) -> bool:
        """Judge a case as a user gets it; return False if the backend declines it, as it may."""
        return self.judge.copy(case)

    def within(self, shape: Shape, src: Any, dst: Any, *, step: int = 1, **how: Any) -> Case:
        """Return a copy within one cache, from some ids to others."""
        cache = self.cache(shape, src, step=step, **how)
        return Case(cache, replace(cache, ids=self.ids(dst)), len(src) * step)

    def both(self, *some: Any, **how: Any) -> None:
        """Judge `some` copies of each direction."""
        for direction in DIRECTIONS:
            self.copy(self.some(direction, *some, **how))
