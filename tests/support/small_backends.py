# SPDX-License-Identifier: Apache-2.0
"""Small backends for tests: they do what `reference` does, or move bytes run by run, under
claims of the test's choice, and keep what they were given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from portakv import CopyPlan, Index, KVView, Unsupported
from portakv.backends.base import Backend, Capabilities, Decision
from portakv.backends.reference import Reference


@dataclass(frozen=True)
class Given:
    """What one launch was called with."""

    plan: CopyPlan
    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int
    stream: torch.Stream | None
    status: torch.Tensor | None

    def ids(self) -> list[torch.Tensor]:
        """The id tensors of both sides."""
        return [x.ids for x in (self.src_index, self.dst_index) if x.ids is not None]


class ByRuns:
    """A launch that moves ``plan.runs`` with memmove: it skips negative ids by itself."""

    def __init__(self, plan: CopyPlan) -> None:
        self.plan = plan

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        runs = self.plan.runs(src, dst, src_index, dst_index, count)
        for source, target, nbytes in zip(*(column.tolist() for column in runs), strict=True):
            ctypes.memmove(target, source, nbytes)


class Small(Reference):
    """The base of backends that `small_backend` makes."""

    claims: dict[str, Any]
    given: list[Given]
    asked: list[str]
    by_runs: bool
    pending: Any
    rejects: Callable[[CopyPlan], bool] | None
    refuses: Callable[[CopyPlan], bool] | None
    spoil: Callable[[KVView], None] | None

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        cls.asked.append("probe")
        return Decision(cls.name, True, "it is a test")

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), **self.claims)

    def check(self, plan: CopyPlan) -> Decision:
        self.asked.append("check")
        if self.rejects is not None and self.rejects(plan):
            return Decision(self.name, False, "check dislikes this plan")
        return super().check(plan)

    def prepare(self, plan: CopyPlan) -> Any:
        self.asked.append("prepare")
        if self.refuses is not None and self.refuses(plan):
            raise Unsupported("This plan", "prepare dislikes it")
        launch = ByRuns(plan) if self.by_runs else super().prepare(plan)

        def recorded(src: KVView, dst: KVView, *rest: Any) -> Any:
            self.given.append(Given(plan, src, dst, *rest))
            launch(src, dst, *rest)
            if self.spoil is not None:
                self.spoil(dst)
            return self.pending

        return recorded


def small_backend(
    name: str,
    *,
    by_runs: bool = False,
    rejects: Callable[[CopyPlan], bool] | None = None,
    refuses: Callable[[CopyPlan], bool] | None = None,
    spoil: Callable[[KVView], None] | None = None,
    pending: Any = None,
    **claims: Any,
) -> type[Small]:
    """A backend class of its own.

    Args:
        name: its name.
        by_runs: move bytes run by run (which skips negative ids) instead of as `reference` does.
        rejects, refuses: plans that ``check`` rejects, and for which ``prepare`` raises.
        spoil: called with the destination after each launch, to break what was copied.
        pending: what a launch returns.
        claims: fields of `Capabilities` other than those of `reference`.
    """
    body = {
        "name": name, "claims": claims, "given": [], "asked": [], "by_runs": by_runs,
        "pending": pending,
        "rejects": staticmethod(rejects) if rejects else None,
        "refuses": staticmethod(refuses) if refuses else None,
        "spoil": staticmethod(spoil) if spoil else None,
    }  # fmt: skip
    return type(name.title(), (Small,), body)


assert issubclass(Small, Backend)
