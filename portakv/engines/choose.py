# SPDX-License-Identifier: Apache-2.0
"""`host`: prepares the engines and picks one for each transfer, by what they cost on this device.

It carries nothing out itself, so that it can do what the engine that it picks can do. It cannot be
captured: which engine is best, and what crosses in which piece, is worked out on the host from the
ids of each transfer, and would stay in a graph as it was at capture.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.engines.costs import Costs, costs_of
from portakv.engines.engine import Engine, direction_of, read_on
from portakv.engines.link import by_torch, crossing
from portakv.engines.picking import ORDER, Pick, pick
from portakv.engines.shapes import RunCounter, Shape
from portakv.engines.terms import Terms
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan
from portakv.registry.builtin import BUILT_IN
from portakv.registry.ids import bring
from portakv.registry.registry import Choice
from portakv.runtime._flight import inside
from portakv.runtime.transfer import Pending
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.view import KVView

_MOST = 1024  # picks that one launch remembers
_UNSTAGED = ("descriptors", "direct")  # they take no memory of the device


class Host(Engine):
    """The engine of a device that picks engines.

    Args:
        device: the device.
        half: what carries out the device's half of a copy; None: what the registry chooses.
        terms: what the caller asks of the transfers.
        costs: what engines cost; None: what was measured on this device, or is assumed.
    """

    name = "host"

    def __init__(
        self,
        device: torch.device,
        half: Choice | None = None,
        terms: Terms | None = None,
        costs: Costs | None = None,
    ) -> None:
        super().__init__(device, half, terms)
        self._costs = costs
        self._lock = threading.Lock()
        self._asked: tuple[dict[str, Backend], dict[str, str]] | None = None

    @property
    def costs(self) -> Costs:
        """What engines cost on this device."""
        return self._costs or costs_of(self.device)

    @property
    def engines(self) -> Mapping[str, Backend]:
        """The engines that serve this device, by name."""
        return self._ask()[0]

    @property
    def out(self) -> Mapping[str, str]:
        """The engines that do not, and why, as a phrase."""
        return self._ask()[1]

    def capabilities(self) -> Capabilities:
        served = [engine.capabilities().places for engine in self.engines.values()]
        return Capabilities(places=frozenset().union(*served), index_on="any")

    def check(self, plan: CopyPlan) -> Decision:
        answers = {name: engine.check(plan) for name, engine in self.engines.items()}
        able = [name for name, answer in answers.items() if answer.accepted]
        if able:
            return Decision(self.name, True, f"takes the plan, by {' or '.join(able)}")
        reasons = {name: answer.reason for name, answer in answers.items()} | dict(self.out)
        told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        return Decision(self.name, False, f"no engine takes it ({told})")

    def prepare(self, plan: CopyPlan) -> HostLaunch:
        launch = HostLaunch(plan, self)
        launch.prepare_one()
        _ = self.costs  # read now, rather than in a transfer
        return launch

    def _ask(self) -> tuple[dict[str, Backend], dict[str, str]]:
        with self._lock:
            if self._asked is None:
                engines: dict[str, Backend] = {}
                out: dict[str, str] = {}
                for name in ORDER:
                    made = self._make(name)
                    if isinstance(made, str):
                        out[name] = made
                    else:
                        engines[name] = made
                self._asked = engines, out
        return self._asked

    def _make(self, name: str) -> Backend | str:
        """An engine, or why it does not serve this device."""
        module, _, attribute = BUILT_IN[name].partition(":")
        try:
            cls: type[Engine] = getattr(importlib.import_module(module), attribute)
            decision = cls.probe(self.device)
            if decision.accepted:
                return cls(self.device, self._half, self.terms)
        except Exception as error:  # one that fails must not take the others down
            return f"it failed to load: {type(error).__name__}: {error}"
        return decision.reason


class HostLaunch:
    """A plan's launches, one for each engine that takes it, each prepared when it is first used.

    Args:
        plan: between a device and the host.
        host: whose engines they are.

    Attributes:
        direction: ``d2h`` or ``h2d``.
        out: engines that do not carry the plan out, and why, as a phrase.
    """

    def __init__(self, plan: CopyPlan, host: Host) -> None:
        self.plan, self.direction = plan, direction_of(plan)
        self._host, self._terms = host, host.terms
        self.out = dict(host.out)
        self._engines: dict[str, Backend] = {}
        for name, engine in host.engines.items():
            decision = engine.check(plan)
            if decision.accepted:
                self._engines[name] = engine
            else:
                self.out[name] = decision.reason
        # To torch each row on the host is a call: nothing folds.
        below = 0 if by_torch(host.device) else crossing(host.device).fold_below
        self._lock = threading.RLock()
        self._launches: dict[str, Launch] = {}
        self._whole = RunCounter(plan, fold_below=below)
        self._of_host = RunCounter.of_host(plan, below)
        self._picks: dict[tuple[int, int, int, int], Pick] = {}

    def prepare_one(self) -> None:
        """Prepare the first engine that can be, so that the plan is known to be carried out.

        Raises:
            Unsupported: none can be, with each one's reason.
        """
        if any(self._prepared(name) is not None for name in list(self._engines)):
            return
        lines = "\n".join(f"  {name}: {why}" for name, why in self.out.items())
        raise Unsupported("A copy between the device and the host", f"no engine takes it:\n{lines}")

    def pick(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int
    ) -> Pick:
        """The engine that the transfer of ``count`` positions takes; moves nothing.

        Raises:
            Unsupported: every engine has turned out not to carry the plan out.
        """
        theirs = dst_index if self.direction == "d2h" else src_index
        whole = self._whole.groups(src_index, dst_index, count)
        of_host = self._of_host.groups(theirs, theirs, count)
        out = self.out
        # An engine that turns out to be out ends every pick that was made before.
        key = whole, of_host, count, len(out)
        found = self._picks.get(key)
        if found is None:
            shapes = self._shapes(whole, of_host, count)
            found = pick(shapes, self.direction, out, self._terms, self._host.costs)
            if len(self._picks) >= _MOST:
                self._picks.clear()
            self._picks[key] = found
        return found

    def carry(
        self,
        engine: str,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
    ) -> Pending | None:
        """Carry a transfer out by one engine, whatever would be picked.

        Raises:
            Unsupported: the engine does not carry the plan out.
        """
        launch = self._prepared(engine)
        if launch is None:
            why = self.out.get(engine, "there is no such engine")
            raise Unsupported(f"A copy by the engine {engine!r}", why)
        mine, theirs = self._placed(engine, src_index, dst_index, stream)
        return launch(src, dst, mine, theirs, count, stream, None)

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
        if not count:
            return None
        picked = self.pick(src, dst, src_index, dst_index, count).engine
        while self._prepared(picked) is None:  # it is out now, and another one is picked
            picked = self.pick(src, dst, src_index, dst_index, count).engine
        asked = src, dst, src_index, dst_index, count, stream
        try:
            return self.carry(picked, *asked)
        except torch.OutOfMemoryError:
            # The device has no room for staging. Others need none, and may move rows once more.
            able = [name for name in _UNSTAGED if name != picked and self._prepared(name)]
            if not able:
                raise
            return self.carry(able[0], *asked)

    def _shapes(self, whole: int, of_host: int, count: int) -> dict[str, Shape]:
        """What a copy is to each engine."""
        mirrored = self._of_host.shape(of_host, count)
        return {
            "staged": mirrored,
            "descriptors": self._whole.shape(whole, count),
            "direct": self._whole.unmerged(count),
            "ring": mirrored,
        }

    def _prepared(self, name: str) -> Launch | None:
        """The launch of an engine, prepared now if need be; None where it cannot be."""
        launch = self._launches.get(name)
        if launch is not None or name not in self._engines:
            return launch
        with self._lock:
            if name in self._engines and name not in self._launches:
                try:
                    self._launches[name] = self._engines[name].prepare(self.plan)
                except Unsupported as error:
                    self._refuse(name, str(error))
                except Exception as error:  # a compiler that fails must not end the transfer
                    self._refuse(name, f"it failed to prepare: {type(error).__name__}: {error}")
            return self._launches.get(name)

    def _refuse(self, name: str, why: str) -> None:
        self.out = {**self.out, name: why}
        del self._engines[name]

    def _placed(
        self, name: str, src_index: Index, dst_index: Index, stream: torch.Stream | None
    ) -> tuple[Index, Index]:
        """Both indices with their ids where an engine reads them."""
        can = self._engines[name].capabilities()
        if can.index_on == "any":
            return src_index, dst_index
        home, dtypes = can.home_of_ids(self._host.device), can.index_dtypes
        # Detached, the next layer's engine may read them on a stream that waits for no other.
        apart = stream is not None and self._terms.detached
        with inside(None if apart else stream):
            bring((src_index, dst_index), home, dtypes)
            mine, theirs = (
                index if index.ids is None else index.placed(home, dtypes)
                for index in (src_index, dst_index)
            )
        if stream is not None and apart:
            stream.wait_stream(torch.accelerator.current_stream(self._host.device.index))
        return read_on(stream, mine), read_on(stream, theirs)
