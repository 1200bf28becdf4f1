# SPDX-License-Identifier: Apache-2.0
"""Ways of moving a case: PortaKV's engines, and the plain memcpy that they are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from portakv import copy_blocks
from portakv.transfer import Transfer

from .harness import Variant
from .host_memory import Sides

MEMCPY = "memcpy"
CHOSEN = "host"
#: Pieces of one transfer from which on `descriptors` is not measured: each costs the host most of
#: a microsecond, so that this many take longer than the bytes of any case.
MOST_RUNS = 20_000


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

    def left_out(self, runs: int) -> str:
        """Why it is not measured with so many runs; empty where it is."""
        if self.engine == "descriptors" and runs > MOST_RUNS:
            return f"{runs} runs, a descriptor each; measured up to {MOST_RUNS}"
        return ""

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


def direct(blocks: int | None = None) -> Way:
    """The direct engine, with at most so many thread blocks; None: its own limit."""
    if blocks is None:
        return Way("direct", "direct")
    return Way(f"direct {blocks}", "direct", {"max_thread_blocks": blocks})


def by_engine(way: Way, sides: Sides, direction: str) -> Variant:
    """A case through an engine, every byte of the destination checked."""
    return Variant(
        {"backend": way.name, "engine": way.engine, "op": direction},
        lambda i: way.move(sides, direction),
        lambda i: sides.poison(direction),
        lambda i: sides.right(direction),
    )


def memcpy(sides: Sides, direction: str) -> Variant:
    """One copy of as many bytes between dense memory and the same host memory."""
    return Variant(
        {"backend": MEMCPY, "engine": MEMCPY, "op": direction},
        lambda i: plain(sides, direction),
        lambda i: sides.poison_plain(direction),
        lambda i: sides.plain_right(direction),
    )


def plain(sides: Sides, direction: str) -> None:
    """The plain copy, on the current stream."""
    source, target = (sides.dense, sides.flat) if direction == "d2h" else (sides.flat, sides.dense)
    target.copy_(source, non_blocking=True)
