# SPDX-License-Identifier: Apache-2.0
"""The backend protocol: the classes that a backend implements, and the order of the calls.

The library calls a backend in this order:

- `Backend.probe` decides, for a device and without side effects, whether the class can run there.
- The constructor creates the backend for the device, once.
- `Backend.capabilities` returns its claims. The conformance suite tests each claim.
- `Backend.check` decides about one plan. The default compares the plan with the claims.
- `Backend.prepare` compiles and loads everything that the plan needs, and returns a `Launch`.
- The launch runs once for each copy, in any number of threads if the backend claims ``threads``.

The registry runs a self-check, from the claims to a launch, before it chooses a backend. If
`check` or `prepare` rejects a plan, the registry tries the next backend, unless the caller forced
this one. One more method is optional: `Backend.hides`.

A copy that packs or unpacks rows has a `PackPlan`. The registry passes it only to a backend that
claims its encoding, to `Backend.check_pack` and `Backend.prepare_pack` in place of `check` and
`prepare`; `reference` carries out what no earlier backend takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from portakv.backends.row_kernels import TAKES, RowKernels
from portakv.errors import Unsupported
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Pending as Pending
from portakv.selection import Decision as Decision
from portakv.view.index import Index
from portakv.view.view import KVView

_HOST = torch.device("cpu")
#: Rows on a different device than the one that a kernel runs on. The kernel reads them: no kernel
#: writes into the memory of a different device.
PEERS = frozenset({("peer", "device")})


def places_on(device: torch.device) -> frozenset[tuple[str, str]]:
    """Return the pairs of places between which rows stay on ``device``."""
    if device.type != "cpu":
        return frozenset({("device", "device")})
    host = ("pageable", "pinned")
    return frozenset(product(host, host))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The claims of a backend; the conformance suite tests each claim both ways.

    Attributes:
        places: pairs (source place, destination place) that it copies between.
        index_on: ``host`` or ``device``: where it reads ids. Only transfer strategies claim
            ``any``: they bring each side's ids to where they need them.
        index_dtypes: dtypes of ids that it reads.
        skips_negative: it skips positions whose id is negative.
        guards: it moves nothing for an id past the end, and reports the first such id in the status
            word.
        alignment: the least vector it needs, in bytes.
        max_loops: strided loops in a nest that it takes; None for any number.
        tables: it takes planes that are addressed by a pointer table.
        capturable: a launch can be captured into a device graph.
        threads: several threads may call one launch concurrently.
        encodings: the encodings that it carries out, such as ``pack``: it then implements
            `Backend.prepare_pack`.
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
    encodings: frozenset[str] = frozenset()

    def home_of_ids(self, device: torch.device) -> torch.device:
        """Return the device where ids must be for a backend of ``device``."""
        return device if self.index_on == "device" else _HOST


class Launch(Protocol):
    """A prepared copy. It is immutable, and allocates, synchronises and logs as little as possible.

    ``count`` tokens are moved, a multiple of the plan's unit. ``stream`` orders the work (None: the
    current stream of its device). ``status`` is a pinned int64 word: a backend that guards writes
    position + 1 of the first bad id there (None: nothing is reported). Returns None if the work is
    ordered on the stream, else a `Pending`.

    A launch may have an attribute ``tables``, a pair: True for each side whose `KVView.table` it
    reads. Without the attribute, a side's table is read if its plan looks addresses up.
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


class PackLaunch(Protocol):
    """A prepared copy that packs or unpacks rows; as `Launch`, with one more argument.

    ``count`` is a multiple of the plan's unit, which is one block. ``overflow`` is an int32 tensor
    on the backend's device with a word for each block of this call, all 0. If the launch has an
    attribute ``overflow_on_host`` that is true, it is on the host, as ``status`` is, and a kernel
    may write it at any time before its end. The launch writes 1
    there for each block that has a plane whose escapes do not fit (pack), or a slot with the flag
    of such a plane (unpack). It goes on with all other planes: the slot of a plane that overflows
    holds the flag only, and the rows of a flagged slot are not written.
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
        overflow: torch.Tensor,
    ) -> Pending | None: ...


class MoveLaunch:
    """A launch that receives its copy as one value.

    A subclass implements `carry`; or `enqueue`, if the copy needs no current stream.

    Attributes:
        device: made current if no stream is passed; None: ops find the device by their tensors.
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
        """Order a copy of at least one token on ``stream`` (None: the device's current stream)."""
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


#: Return why the bytes of a tensor do not lie where its strides say, and what to do; "" if they do.
FormatCheck = Callable[[torch.Tensor], str]


class Backend(ABC):
    """One method of executing plans on one device.

    A subclass sets ``name`` and implements `probe`, `capabilities` and `prepare`.

    Attributes:
        name: the name under which it is registered.
        emulated: the device or the driver is emulated.
        carrier: the executor of plans if the backend has several, such as ``the AscendC kernel``.
        library: the path of a library that was built for the backend beforehand.
        row_kernels: those that copy inside the device, for copies that the core makes as a whole.
            None: the backend's launches do all.
    """

    name: str = ""
    # The conformance suite's reports contain these three.
    emulated: bool = False
    carrier: str = ""
    library: str = ""
    row_kernels: RowKernels | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    @abstractmethod
    def probe(cls, device: torch.device) -> Decision:
        """Decide whether this backend can run on ``device``; cheap, without side effects.

        If torch does not know the device's type, ``device`` is a name with ``type`` and ``index``
        only. The decision then counts for its reason, such as a package to install.
        """

    @classmethod
    def hides(cls, device: torch.device) -> FormatCheck | None:
        """Return a function that detects tensors on ``device`` in a private format of the vendor.

        This is a method of the class, since no backend may move such a tensor. The library calls it
        once for each device that extends torch, and the returned function once for each view.
        """
        return None

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Return the claims of this backend on its device."""

    def check(self, plan: CopyPlan) -> Decision:
        """Decide whether the backend takes this plan; pure. The default compares plan and claims.

        A backend that reads rows by `KVView.plane` rejects forms that have no plane to show::

            decision = super().check(plan)
            why = plan.src.unshown or plan.dst.unshown
            if decision.accepted and why:
                return Decision(self.name, False, f"{why}, and its op takes whole planes")
            return decision
        """
        why = refusal(self.capabilities(), plan)
        accepts = TAKES
        if plan.src.place == "peer":
            accepts = "reads the peer's rows, with the whole device"
        return Decision(self.name, why is None, why or accepts)

    @abstractmethod
    def prepare(self, plan: CopyPlan) -> Launch:
        """Compile and load everything that the plan needs, and return the launch.

        Raises:
            Unsupported: the plan cannot be executed; nothing was written.
        """

    def check_pack(self, plan: PackPlan) -> Decision:
        """Decide whether the backend packs or unpacks by this plan; pure.

        The default compares the plan with the claims.
        """
        why = refusal(self.capabilities(), plan)
        return Decision(self.name, why is None, why or f"carries out {plan.encoding!r}")

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        """Prepare a copy that packs or unpacks; for backends that claim its encoding.

        Raises:
            Unsupported: the plan cannot be executed; nothing was written.
        """
        raise Unsupported(f"The encoding {plan.encoding!r}", f"{self.name} does not carry it out")


def refusal(can: Capabilities, plan: CopyPlan | PackPlan) -> str | None:
    """Return the first claim that a plan exceeds, as a sentence, or None."""
    if isinstance(plan, PackPlan) and plan.encoding not in can.encodings:
        return f"it does not carry out the encoding {plan.encoding!r}"
    route = (plan.src.place, plan.dst.place)
    if route not in can.places:
        return f"it does not copy from {route[0]} to {route[1]} memory"
    if isinstance(plan, CopyPlan):
        if plan.vector < can.alignment:
            return f"it needs {can.alignment} B alignment and the plan allows {plan.vector} B"
        loops = max(len(nest.loops) for nest in plan.nests)
        if can.max_loops is not None and loops > can.max_loops:
            return f"it takes {can.max_loops} strided loops and the plan has {loops}"
    if plan.tabled and not can.tables:
        return "it takes no pointer tables and the planes lie in separate allocations"
    return None
