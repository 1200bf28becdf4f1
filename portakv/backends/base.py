# SPDX-License-Identifier: Apache-2.0
"""What a backend is: probe, capabilities, check, prepare; and the launch that it prepares."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Pending as Pending
from portakv.view.index import Index
from portakv.view.view import KVView


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a candidate was accepted, and the reason, as a sentence."""

    name: str
    accepted: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'accepted' if self.accepted else 'rejected'}, {self.reason}"


_HOST = torch.device("cpu")
#: Rows that lie on another device than the one that a kernel runs on. It reads them: nobody writes
#: into another's memory.
PEERS = frozenset({("peer", "device")})


def places_on(device: torch.device) -> frozenset[tuple[str, str]]:
    """The pairs of places between which rows stay on ``device``."""
    if device.type != "cpu":
        return frozenset({("device", "device")})
    host = ("pageable", "pinned")
    return frozenset(product(host, host))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend claims; the conformance suite tests each claim both ways.

    Attributes:
        places: pairs (source place, destination place) that it copies between.
        index_on: ``host`` or ``device``: where it reads ids. Engines alone say ``any``: they bring
            each side's ids to where they need them.
        index_dtypes: dtypes of ids that it reads.
        skips_negative: it skips positions whose id is negative.
        guards: it moves nothing for an id past the end, and reports the first in the status word.
        alignment: the least vector it needs, in bytes.
        max_loops: strided loops in a nest that it takes; None for any number.
        tables: it takes planes that are addressed by a pointer table.
        capturable: a launch can be captured into a device graph.
        threads: one launch may be called from several threads at once.
    """

    places: frozenset[tuple[str, str]]
    index_on: str = "device"
    index_dtypes: frozenset[torch.dtype] = frozenset({torch.int32, torch.int64})
    skips_negative: bool = False
    guards: bool = False
    alignment: int = 1
    max_loops: int | None = None
    tables: bool = True
    capturable: bool = False
    threads: bool = True

    def home_of_ids(self, device: torch.device) -> torch.device:
        """Where ids have to be for a backend of ``device``."""
        return device if self.index_on == "device" else _HOST


class Launch(Protocol):
    """A prepared copy. It is immutable, and allocates, synchronises and logs as little as it can.

    ``count`` tokens are moved, a multiple of the plan's unit. ``stream`` is where to order the
    work (None: the current stream of its device). ``status`` is a pinned int64 word: a backend that
    guards leaves position + 1 of the first bad id there (None: it only moves nothing). Returns None
    if the work is ordered on the stream, else a `Pending`. With ``tables``, a pair, it tells for
    each side whether it reads `KVView.table`; without, that is so if its plan looks addresses up.
    """

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> Pending | None: ...


class MoveLaunch:
    """A launch that is given its copy as one value. A subclass implements `carry`; or `enqueue`, if
    it needs no stream to be the current one.

    Attributes:
        device: made the current one if no stream is given; None: ops find it by their tensors.
    """

    device: torch.device | None = None

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> Pending | None:
        """See `Launch`."""
        if not count:
            return None
        return self.enqueue(Move(src, dst, src_index, dst_index, count), stream, status)

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        """Order a copy of at least one token on ``stream`` (None: the device's current one)."""
        where = self.device if stream is None else stream
        if where is None:
            self.carry(move, status)
            return None
        with inside(where):
            self.carry(move, status)
        return None

    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        """Order the copy on the current stream."""
        raise NotImplementedError


class Again(Protocol):
    """A launch with everything settled but addresses and a count; see `Repeatable`.

    ``most`` is the most tokens that one call moves. Arguments: of the source and of the destination
    the address of its ids, or without ids of its tensor; the position of the first id, the tokens
    to move, and the address of the status word (0: none). The work is ordered on the current
    stream.
    """

    most: int

    def __call__(self, src: int, dst: int, first: int, count: int, status: int) -> None: ...


class Repeatable(Launch, Protocol):
    """A launch that takes less host time if the same transfer is made again.

    Having `again` is no claim: without it the library calls the launch itself each time.
    """

    def again(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> Again | None:
        """The launch with these arguments: each side is memory that stays, under device ids of step
        1 and offset 0, or one dense tensor without ids. None if more than that can change."""


#: Return why the bytes of a tensor do not lie where its strides say, and what to do; "" if they do.
FormatCheck = Callable[[torch.Tensor], str]


def __getattr__(name: str) -> object:
    """Return `FormatCheck` under its old name, with a warning."""
    if name == "Tells":
        why = "Tells ships in 0.1.0 and goes in 0.2.0; use FormatCheck."
        warnings.warn(why, DeprecationWarning, stacklevel=2)
        return FormatCheck
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Backend(ABC):
    """One way of carrying plans out on one device.

    A subclass sets ``name`` and implements `probe`, `capabilities` and `prepare`.
    """

    name: str = ""
    #: What the suite's reports say of it: whether it emulates its device; what carries plans out if
    #: there is more than one way, such as ``the AscendC kernel``; and the file of the library that
    #: was built for it beforehand.
    emulated: bool = False
    carrier: str = ""
    library: str = ""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    @abstractmethod
    def probe(cls, device: torch.device) -> Decision:
        """Whether this backend can run on ``device``; cheap, without side effects.

        If torch does not know the device's type, ``device`` is a name with ``type`` and
        ``index`` only. Then the answer counts for its reason: what to install.
        """

    @classmethod
    def hides(cls, device: torch.device) -> FormatCheck | None:
        """A function that says whether a tensor on ``device`` has a private format of the vendor's.

        Asked of the class, since no backend may move such a tensor, whichever serves the plan: once
        for each device that extends torch. The function is called once for each view.
        """
        return None

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend claims on its device."""

    def check(self, plan: CopyPlan) -> Decision:
        """Whether it takes this plan; pure. The default compares plan and capabilities.

        A backend that reads rows by `KVView.plane` refuses forms that have no plane to show::

            decision = super().check(plan)
            why = plan.src.unshown or plan.dst.unshown
            if decision.accepted and why:
                return Decision(self.name, False, f"{why}, and its op takes whole planes")
            return decision
        """
        why = refusal(self.capabilities(), plan)
        reads = plan.src.place == "peer"
        told = "reads the peer's rows, with the whole device" if reads else "takes the plan"
        return Decision(self.name, why is None, why or told)

    @abstractmethod
    def prepare(self, plan: CopyPlan) -> Launch:
        """Compile, load and return the launch.

        Raises:
            Unsupported: the plan cannot be carried out; nothing was written.
        """


def refusal(can: Capabilities, plan: CopyPlan) -> str | None:
    """The first claim that a plan exceeds, as a sentence, or None."""
    route = (plan.src.place, plan.dst.place)
    if route not in can.places:
        return f"it does not copy from {route[0]} to {route[1]} memory"
    if plan.vector < can.alignment:
        return f"it needs {can.alignment} B alignment and the plan allows {plan.vector} B"
    loops = max(len(nest.loops) for nest in plan.nests)
    if can.max_loops is not None and loops > can.max_loops:
        return f"it takes {can.max_loops} strided loops and the plan has {loops}"
    if plan.tabled and not can.tables:
        return "it takes no pointer tables and the planes lie in separate allocations"
    return None
