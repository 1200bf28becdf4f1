# SPDX-License-Identifier: Apache-2.0
"""Share settings and methods among the parts of the host benchmark.

The methods are PortaKV's transfer strategies, and the plain memcpy that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from portakv import Index, copy_blocks
from portakv.copy.handle import BlockTransfer
from portakv.core.pick import BITS, EXCLUDED, ORDER, pick_copy
from portakv.interconnect.choose import HostLaunch, across
from portakv.interconnect.link import RunCounter
from portakv.interconnect.strategy import Terms
from portakv.plan.plan import Move
from portakv.registry.prepared import prepared
from portakv.registry.registry import STRATEGIES, choose, trace
from portakv.runtime.transfer import Transfer
from portakv_benchmarks.host.cases import BLOCK_FIRST, BothIds, Case, Region, Scene, Sides
from portakv_benchmarks.host.driver_clock import DriverClock
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Fields, Measured, Variant
from portakv_benchmarks.shared.peers import LMCache
from portakv_benchmarks.shared.shapes import in_words

KB = 1 << 10
MB = 1 << 20
GB = 1 << 30
#: Bytes from which on the grid has fewer host sides.
RARE = 512 * MB


@dataclass(frozen=True, slots=True)
class HostPreset:
    """Set the amount of measurement; sizes in bytes."""

    runs: tuple[int, ...]  # of the grid, their lengths
    payloads: tuple[int, ...]  # of the grid; from `RARE` on with two host sides only
    largest: int  # payload, of two scenes more
    seconds: float  # bound the rounds of one measurement
    thread_blocks: tuple[int, ...]  # limits of `zero_copy`
    direct: int  # the payload that it is swept with
    whole_call: tuple[int, ...]  # payloads by the wall clock
    pages: tuple[int, ...]  # the same in pages of 2 MiB
    inside: tuple[tuple[str, int], ...]  # the same inside a device: shapes, and their tokens
    duplex: tuple[int, ...]  # payloads of each direction, for both at the same time
    pageable: tuple[int, ...]  # payloads between a device and pageable memory
    ring_slots: tuple[tuple[int, int], ...]  # of a plain pinned ring: slots, and bytes of one
    alongside: int  # the payload of one transfer alongside a model
    loop_seconds: float  # how long a loop runs alone
    repeats: int  # how often each method meets it
    waiting: (
        float  # seconds of transfers that follow each other, alongside copies of another stream
    )
    matmul: int  # the side of its square matrices
    attention: tuple[int, int, int]  # batch, heads and tokens of the decode loop
    small: tuple[int, ...]  # counts of integers
    small_samples: int  # calls alongside a large copy if a target reads them; idle ones are more
    large: int  # that copy's bytes
    pinned: int  # bytes to pin
    call_rows: tuple[int, ...]  # bytes of a row, for the host time of block transfers
    call_blocks: int  # blocks x 64 planes
    new_blocks: tuple[int, ...]  # blocks of 32 layers in copies by new ids
    registered: tuple[str, int]  # the shape of registered calls, and its tokens
    registered_rounds: int
    anew: int  # calls on the CPU, of each kind
    calls: int  # how often each is called; beyond the first length of rows a third as often

    def payloads_of(self, scene: Scene) -> list[int]:
        """Return the payloads of a scene of the grid."""
        often = scene.order == "dense" or (scene.host, scene.order) == (BLOCK_FIRST, "random")
        return [payload for payload in self.payloads if often or payload < RARE]

    def rounds(self, payload: int) -> int:
        """Return the number of rounds that measure a payload: small payloads vary more from round
        to round."""
        limits = (8 * MB, 25), (32 * MB, 15), (128 * MB, 9)
        return next((rounds for most, rounds in limits if payload <= most), 5)


HOST_PRESETS: Mapping[str, HostPreset] = {
    "full": HostPreset(
        runs=(256, 2 * KB, 8 * KB, 32 * KB, 2 * MB),
        payloads=tuple(n * MB for n in (1, 4, 8, 32, 64, 128, 512)),
        largest=GB,
        seconds=1.5,
        thread_blocks=(1, 2, 4, 8, 16),
        direct=128 * MB,
        whole_call=(2 * MB, 16 * MB, 128 * MB),
        pages=(12 * MB, 512 * MB),
        inside=(
            ("llama3-8b-16", 16),
            ("llama3-8b-64", 64),
            ("llama3-8b-chunk", 128),
            ("llama3-8b-chunk", 1792),
            ("deepseek-fp8-656", 4096),
        ),
        duplex=(32 * MB, 128 * MB, 512 * MB),
        pageable=(32 * MB, 256 * MB),
        ring_slots=((2, 4 * MB), (4, 4 * MB), (3, 16 * MB), (4, 16 * MB)),
        alongside=128 * MB,
        loop_seconds=0.55,
        repeats=5,
        waiting=0.2,
        matmul=8192,
        attention=(32, 32, 4096),
        small=(1, 64, 1000, 4096, 10_000, 100_000),
        small_samples=31,
        large=GB,
        pinned=17 * GB,
        call_rows=(256, 2048),
        call_blocks=1000,
        new_blocks=(6, 64, 256),
        registered=("llama3-8b-chunk", 16),
        registered_rounds=2000,
        anew=2000,
        calls=30,
    ),
    "tiny": HostPreset(  # for tests: it runs everywhere in seconds and its figures mean nothing
        runs=(2 * KB, 32 * KB),
        payloads=(64 * KB,),
        largest=128 * KB,
        seconds=0.02,
        thread_blocks=(8,),
        direct=64 * KB,
        whole_call=(64 * KB,),
        pages=(4 * MB,),
        inside=(("llama3-8b-chunk", 16),),
        duplex=(64 * KB,),
        pageable=(64 * KB,),
        ring_slots=((2, 16 * KB),),
        alongside=64 * KB,
        loop_seconds=0.001,
        repeats=2,
        waiting=0.001,
        matmul=16,
        attention=(1, 1, 16),
        small=(1, 64),
        small_samples=2,
        large=64 * KB,
        pinned=3 * MB,
        call_rows=(256,),
        call_blocks=2,
        new_blocks=(2,),
        registered=("llama3-8b-chunk", 16),
        registered_rounds=16,
        anew=20,
        calls=3,
    ),
}


class Bench:
    """The device, what times it, the peers, and memory that is kept from part to part."""

    def __init__(
        self, device: torch.device, preset: HostPreset, peers: Sequence[LMCache] = ()
    ) -> None:
        self.device = device
        self.preset = preset
        self.peers = peers
        self.module = torch.get_device_module(device)
        self.host_timer = harness.HostTimer(device)
        #: For calls of a process that works all the time, as a serving engine does.
        self.busy_timer = harness.HostTimer(device, busy=True)
        # Events that tell the time are had on CUDA devices.
        self.timer = (
            harness.DeviceTimer(device, link=True) if device.type == "cuda" else self.host_timer
        )
        self.left_out: list[str] = []  # a line for each thing that was not measured
        self.named = ""  # what the result is called if not by its suite
        #: Times the driver's submissions; None: nothing does.
        self.clock: DriverClock | None = None
        self._regions: dict[bool, Region] = {}
        #: Why a strategy does not serve the device, by its name.
        self.absent = {
            one.name: one.reason
            for one in trace(device)
            if one.name in STRATEGIES and not one.accepted
        }

    @property
    def releases(self) -> dict[str, str]:
        """Return the release of each peer, by name."""
        return {peer.name: peer.release for peer in self.peers}

    def region(self, payload: int, *, pageable: bool = False) -> Region:
        """Return memory for cases of up to so many bytes.

        It is cached, and made again if it is too small.
        """
        if pageable not in self._regions or self._regions[pageable].host.numel() < 2 * payload:
            self._regions.pop(pageable, None)
            self._regions[pageable] = Region.reserve(self.device, payload, pageable=pageable)
        return self._regions[pageable]

    def measure(
        self,
        ceiling: Variant,
        variants: Sequence[Variant],
        payload: int,
        timer: harness.Timer | None = None,
    ) -> list[Measured]:
        """Measure variants in turns with a ceiling, on one device and one region.

        ``timer``: what times them; None: `timer`, which hides the host's part.
        """
        limits = 1, self.preset.rounds(payload), self.preset.seconds
        return harness.measure(ceiling, variants, timer or self.timer, *limits)

    def sides(self, case: Case) -> Sides:
        """Return a case in the retained memory; its ids lie wherever strategies read them."""
        largest = max(case.payload, self.preset.alongside, *self.preset.payloads)
        sides = Sides(case, self.region(largest))
        sides.settle()
        return sides

    def serving(self, methods: Iterable[Method]) -> list[Method]:
        """Return the methods whose strategies serve the device."""
        return [method for method in methods if method.engine not in self.absent]

    def forget(self) -> None:
        self._regions.clear()

    def stream(self) -> torch.Stream:
        return cast(torch.Stream, self.module.Stream(self.device))


MEMCPY = "memcpy"
CHOSEN = "host"
#: Pieces of one transfer up to which `batched_memcpy` is measured, and the bytes of one from which
#: on: each costs the host most of a microsecond, in which the link moves that many.
MOST_RUNS = 20_000
LEAST_RUN = 32 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A strategy under terms."""

    name: str  # what its rows are called
    engine: str  # what ``backend=`` takes
    terms: Fields = field(default_factory=dict)  # other keywords of `copy_blocks`

    def left_out(self, case: Case) -> str:
        """Return a line on why it is not measured with a case; empty if it is."""
        if self.engine != BATCHED_MEMCPY.engine:
            return ""
        if case.scene.run < LEAST_RUN:
            least = f"{self.name}: all runs under {in_words(LEAST_RUN)}"
            return f"{least}, since each costs the host longer than the link"
        runs = f"{self.name}, {case.name}: {case.runs} runs; measured up to {MOST_RUNS}"
        return runs if case.runs > MOST_RUNS else ""

    def taken(self, transfer: Transfer) -> dict[str, str]:
        """Return the fields of a row on the choice that a transfer made: ``chosen``, the strategy,
        and ``terms``, its limits. Empty if no strategy is chosen."""
        if self.engine != CHOSEN:
            return {}
        terms = {"overlap": Terms().overlap, **self.terms}
        words = ", ".join(f"{name}={value}" for name, value in terms.items())
        return {"chosen": cast(BlockTransfer, transfer).statistics.strategy, "terms": words}

    def allowed(self, sides: Sides, direction: str) -> set[str]:
        """Return the strategies that may be chosen for a case under its terms; move nothing."""
        src, dst, *ids = sides.arguments(direction)
        local, remote = (Index() if one is None else one for one in ids)
        steps = local.plan_step, remote.plan_step
        choice = across(choose(sides.dense.device), Terms(**self.terms))
        launch = cast(HostLaunch, prepared(src.form, dst.form, *steps, None, choice).launch)
        move = Move(src, dst, local, remote, sides.case.tokens)
        _, host, _, index = move.ends(launch.downward)
        groups = RunCounter.of_host(launch.plan).groups(index, index, move.count)
        costs, out, _ = launch.terms(host, new=False, look=True)
        of_ids = groups, groups, move.count
        if pick_copy()(launch.picked_at, costs, *of_ids, out, 0, False) & EXCLUDED:
            out |= BITS["zero_copy"]
        return {name for name in ORDER if not out & BITS[name]}

    def move(
        self,
        sides: Sides,
        direction: str,
        stream: torch.Stream | None = None,
        ids: BothIds | None = None,
    ) -> Transfer:
        """Move a case once."""
        arguments = sides.arguments(direction, ids)
        return copy_blocks(*arguments, backend=self.engine, stream=stream, **self.terms)


STAGED = Method("staged", "staged")
BATCHED_MEMCPY = Method("batched_memcpy", "batched_memcpy")
ZERO_COPY = Method("zero_copy", "zero_copy", {"overlap": "idle"})
ZERO_COPY_FEW_BLOCKS = Method("zero_copy beside", "zero_copy")  # with fewer thread blocks
#: The default: a model may be running meanwhile; and the choice for a device that is idle.
HOST = Method(CHOSEN, CHOSEN)
HOST_IDLE = Method(f"{CHOSEN} idle", CHOSEN, {"overlap": "idle"})
#: Alongside a model: no transfer waits for the one before it.
HOST_DETACHED = Method(f"{CHOSEN} detached", CHOSEN, {"detached": True})


def zero_copy(blocks: int) -> Method:
    """Return the strategy `zero_copy`, with at most so many thread blocks."""
    return Method(f"zero_copy {blocks}", "zero_copy", {"max_thread_blocks": blocks})


def by_call(
    sides: Sides,
    direction: str,
    name: str,
    engine: str,
    call: Callable[[], object],
    **labels: object,
) -> Variant:
    """Return any call that moves a case as a variant that checks every byte of the destination."""
    labels = {"backend": name, "engine": engine, "op": direction, **labels}
    return Variant(
        labels,
        lambda i: call(),
        lambda i: sides.poison(direction),
        lambda i: sides.right(direction),
    )


def by_engine(method: Method, sides: Sides, direction: str) -> Variant:
    """Return a case that a strategy moves, as a variant."""
    return by_call(
        sides, direction, method.name, method.engine, lambda: method.move(sides, direction)
    )


def plain_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy plainly, on the current stream."""
    target.copy_(source, non_blocking=True)


def by_memcpy(
    sides: Sides,
    direction: str,
    name: str = MEMCPY,
    copy: Callable[[torch.Tensor, torch.Tensor], object] = plain_copy,
    **labels: object,
) -> Variant:
    """Return one copy of as many bytes between dense memory and the same host memory.

    The copy goes to its first argument.
    """
    target, source = (sides.flat, sides.dense)[:: 1 if direction == "d2h" else -1]
    labels = {"backend": name, "engine": MEMCPY, "op": direction, **labels}
    return Variant(
        labels,
        lambda i: copy(target, source),
        lambda i: sides.poison(direction, plain=True),
        lambda i: sides.plain_right(),
    )
