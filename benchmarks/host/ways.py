# SPDX-License-Identifier: Apache-2.0
"""Ways of moving a case: PortaKV's engines, and the plain memcpy that they are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from portakv import Index, copy_blocks
from portakv.blocks.handle import BlockTransfer
from portakv.engines.choose import HostLaunch, across
from portakv.engines.engine import Terms
from portakv.plan.move import Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import choose
from portakv.runtime.transfer import Transfer
from portakv_benchmarks.host.cases import Case
from portakv_benchmarks.host.memory import Sides
from portakv_benchmarks.shared.harness import Variant
from portakv_benchmarks.shared.shapes import in_words

MEMCPY = "memcpy"
CHOSEN = "host"
#: Pieces of one transfer up to which `descriptors` is measured, and the bytes of one from which on:
#: each costs the host most of a microsecond, in which the link moves that many.
MOST_RUNS, LEAST_RUN = 20_000, 32 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """An engine under terms.

    Attributes:
        name: what its rows are called.
        engine: what ``backend=`` takes.
        terms: other keywords of `copy_blocks`.
    """

    name: str
    engine: str
    terms: Mapping[str, Any] = field(default_factory=dict)

    def left_out(self, case: Case) -> str:
        """Why it is not measured with a case, as a line; empty where it is."""
        if self.engine != DESCRIPTORS.engine:
            return ""
        if case.scene.run < LEAST_RUN:
            return (f"{self.name}: all runs under {in_words(LEAST_RUN)}, since each costs the host "
                    f"longer than the link")  # fmt: skip
        if case.runs > MOST_RUNS:
            return f"{self.name}, {case.name}: {case.runs} runs; measured up to {MOST_RUNS}"
        return ""

    def taken(self, transfer: Transfer) -> dict[str, str]:
        """What a row says of the choice that a transfer made: ``chosen``, the engine, and
        ``terms``, which it had to keep. Empty if no engine is chosen."""
        if self.engine != CHOSEN:
            return {}
        terms = {"overlap": Terms().overlap, **self.terms}
        told = ", ".join(f"{name}={value}" for name, value in terms.items())
        return {"chosen": cast(BlockTransfer, transfer).statistics.engine, "terms": told}

    def allowed(self, sides: Sides, direction: str) -> set[str]:
        """The engines that may be chosen for a case under its terms; moves nothing."""
        src, dst, *ids = sides.arguments(direction)
        mine, theirs = (Index() if one is None else one for one in ids)
        steps = mine.plan_step, theirs.plan_step
        choice = across(choose(sides.device), Terms(**self.terms))
        launch = cast(HostLaunch, prepared(src.form, dst.form, *steps, None, choice).launch)
        picked = launch.pick(Move(src, dst, mine, theirs, sides.case.tokens))
        return {one.engine for one in picked.alternatives if not one.refused}

    def move(
        self, sides: Sides, direction: str, stream: torch.Stream | None = None, ids: Any = None
    ) -> Transfer:
        """Move a case once."""
        arguments = sides.arguments(direction, ids)
        return copy_blocks(*arguments, backend=self.engine, stream=stream, **self.terms)


STAGED, DESCRIPTORS = Way("staged", "staged"), Way("descriptors", "descriptors")
#: The default: a model may be running meanwhile; and the choice for a device that is idle.
HOST = Way(CHOSEN, CHOSEN)
HOST_IDLE = Way(f"{CHOSEN} idle", CHOSEN, {"overlap": "idle"})
#: Beside a model: no transfer waits for the one before it.
HOST_DETACHED = Way(f"{CHOSEN} detached", CHOSEN, {"detached": True})


def direct(blocks: int | None = None) -> Way:
    """The direct engine, with at most so many thread blocks; None: its own limit."""
    if blocks is None:
        return Way("direct", "direct")
    return Way(f"direct {blocks}", "direct", {"max_thread_blocks": blocks})


def by_call(
    sides: Sides, direction: str, name: str, engine: str, call: Callable[[], object], **labels: Any
) -> Variant:
    """Any call that moves a case, every byte of the destination checked."""
    return Variant(
        {"backend": name, "engine": engine, "op": direction, **labels},
        lambda i: call(),
        lambda i: sides.poison(direction),
        lambda i: sides.right(direction),
    )


def by_engine(way: Way, sides: Sides, direction: str) -> Variant:
    """A case through an engine."""
    return by_call(sides, direction, way.name, way.engine, lambda: way.move(sides, direction))


def by_memcpy(
    sides: Sides,
    direction: str,
    name: str = MEMCPY,
    copy: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
    **labels: Any,
) -> Variant:
    """One copy of as many bytes between dense memory and the same host memory.

    Args:
        copy: copies to its first argument; by default `plain_copy` does.
    """
    target, source = (sides.flat, sides.dense)[:: 1 if direction == "d2h" else -1]
    return Variant(
        {"backend": name, "engine": MEMCPY, "op": direction, **labels},
        lambda i: (copy or plain_copy)(target, source),
        lambda i: sides.poison(direction, plain=True),
        lambda i: sides.plain_right(),
    )


def plain_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """The plain copy, on the current stream."""
    target.copy_(source, non_blocking=True)
