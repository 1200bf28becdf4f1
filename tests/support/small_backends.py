# SPDX-License-Identifier: Apache-2.0
"""Small backends for tests: they do what `reference` does, or move bytes run by run, under
claims of the test's choice, and record their calls and launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from portakv import CopyPlan, Index, KVView, TransferError, Unsupported
from portakv.backends.base import Capabilities, Decision, Pending
from portakv.backends.reference import Reference
from support.core_cases import move


class Late(Pending):
    """Work that ends when the test says so."""

    over = False

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        raise TransferError("it failed")


class Launched(NamedTuple):
    """The arguments of one launch."""

    plan: CopyPlan
    src: KVView
    dst: KVView
    src_index: Index
    dst_index: Index
    count: int  # type: ignore[assignment]  # tuples have a method of that name
    stream: torch.Stream | None
    status: torch.Tensor | None

    def ids(self) -> list[torch.Tensor]:
        """Return the id tensors of both sides."""
        return [x.ids for x in (self.src_index, self.dst_index) if x.ids is not None]


def run_by_run(plan: CopyPlan) -> Callable[..., None]:
    """Return a launch that moves ``plan.runs`` with memmove: it skips negative ids by itself."""
    return lambda *move_and_stream: move(plan.runs(*move_and_stream[:5]))


class Small(Reference):
    """The base of backends that `small_backend` makes: the launches and the calls in order, and the
    value that a launch returns."""

    launches: list[Launched]
    calls: list[str]
    pending: Any


def wipe(view: KVView) -> None:
    """Erase the rows that a copy wrote."""
    view.owners[0].view(torch.uint8).zero_()


def small_backend(
    name: str,
    *,
    by_runs: bool = False,  # move bytes run by run, not as `reference` does: skips negative ids
    rejects: Callable[[CopyPlan], bool] = lambda plan: False,  # plans that ``check`` rejects
    refuses: Callable[[CopyPlan], bool] = lambda plan: False,  # for which ``prepare`` raises
    spoil: Callable[[KVView], object] = lambda view: None,  # breaks what a launch has copied
    pending: Any = None,  # what a launch returns
    **claims: Any,
) -> type[Small]:
    """Return a new backend class, with claims other than those of `reference`."""

    class Made(Small):
        @classmethod
        def probe(cls, device: torch.device) -> Decision:
            cls.calls.append("probe")
            return Decision(cls.name, True, "it is a test")

        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), **claims)

        def check(self, plan: CopyPlan) -> Decision:
            self.calls.append("check")
            if rejects(plan):
                return Decision(self.name, False, "check dislikes this plan")
            return super().check(plan)

        def prepare(self, plan: CopyPlan) -> Any:
            self.calls.append("prepare")
            if refuses(plan):
                raise Unsupported("This plan", "prepare dislikes it")
            launch = run_by_run(plan) if by_runs else super().prepare(plan)

            def recorded(src: KVView, dst: KVView, *rest: Any) -> Any:
                self.launches.append(Launched(plan, src, dst, *rest))
                launch(src, dst, *rest)
                spoil(dst)
                return self.pending

            return recorded

    Made.name = name
    Made.launches = []
    Made.calls = []
    Made.pending = pending
    return Made
