# SPDX-License-Identifier: Apache-2.0
"""Share settings, the two processes and the timing of a trial among the parts of the migration
benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import count

import torch

from portakv.migrate import Pull
from portakv_benchmarks.host.suite import GB, HOST_PRESETS, KB, MB, Bench
from portakv_benchmarks.migration.cases import ALL_CASES, Case
from portakv_benchmarks.migration.side import Far, Side
from portakv_benchmarks.shared.harness import Row
from portakv_benchmarks.shared.trials import Method, Sample, Trials, timed

PEERS = ("nixl", "mooncake")
#: Bytes below which there are more rounds on a device, since a raw copy takes one of two times: of
#: 2 MB either 12 or 18 us between two H200.
_SMALL = 32 * MB

#: Sets of weights.
TENSORS = (
    {
        "32 MiB tensors": (4, 4096, 4096),
        "100 of 3 MiB": (100, 1024, 1536),
        "thirds of 3 tensors": (3, 1024, 3 * 9472),
        "2,000 of 512 B": (2000, 16, 16),
    },
    {
        "32 MiB tensors": (32, 4096, 4096),
        "600 of 3 MiB": (600, 1024, 1536),
        "thirds of 3 tensors": (3, 8192, 3 * 9472),
        "291 of 8 MiB": (291, 2048, 2048),
        "32 of 117 MiB": (32, 8192, 7488),
        "2,000 of 512 B": (2000, 16, 16),
    },
)


@dataclass(frozen=True, slots=True)
class MigrationPreset:
    """Set the amount of measurement; sizes in bytes, each for a CPU and for devices."""

    sizes: tuple[tuple[int, ...], tuple[int, ...]]  # of pulls that are mapped
    moved: tuple[tuple[int, ...], tuple[int, ...]]  # of those that are staged
    large: tuple[int, int]  # scattered blocks, both directions together, alongside a loop
    rounds: int = 9  # on a CPU five at most
    times: int = 8  # how often a burst goes in both directions
    calls: int = 200
    repeats: int = 3  # how often a loop is met
    seconds: float = 0.4  # of it
    matmul: int = 8192
    allocations: int = 1000  # of an owner, and of weights that are published
    tensors: Sequence[Mapping[str, tuple[int, int, int]]] = TENSORS  # how many, rows, columns


_FEW = {"tensors": (3, 64, 48), "thirds of tensors": (2, 16, 48)}
MIGRATION_PRESETS: Mapping[str, MigrationPreset] = {
    "full": MigrationPreset(
        sizes=(
            (2 * MB, 8 * MB, 32 * MB, 128 * MB),
            (2 * MB, 8 * MB, 16 * MB, 32 * MB, 128 * MB, GB),
        ),
        moved=((32 * MB, 128 * MB), (128 * MB, GB)),
        large=(128 * MB, GB),
    ),
    "quick": MigrationPreset(
        sizes=((2 * MB, 32 * MB), (2 * MB, 32 * MB, 128 * MB)),
        moved=((32 * MB,), (128 * MB,)),
        large=(32 * MB, 128 * MB),
        rounds=5,
        times=4,
        calls=50,
        repeats=2,
        seconds=0.2,
    ),
    "tiny": MigrationPreset(  # for tests
        sizes=((256 * KB, 512 * KB), (256 * KB,)),
        moved=((256 * KB,), (256 * KB,)),
        large=(512 * KB, 512 * KB),
        rounds=1,
        times=2,
        calls=2,
        repeats=1,
        seconds=0.05,
        matmul=16,
        allocations=8,
        tensors=(_FEW, _FEW),
    ),
}


class MigrationBench(Bench):
    """Two processes: this one, which takes, on its device, and one that gives, on a second device
    if there is one; and the installed peers. More processes give within `several`."""

    def __init__(self, device: torch.device, preset: MigrationPreset) -> None:
        loops = replace(HOST_PRESETS["tiny"], matmul=preset.matmul, loop_seconds=preset.seconds)
        super().__init__(device, loops)
        self.sizes = preset
        self.on = int(device.type != "cpu")
        self.absent = {name: "not installed" for name in PEERS if find_spec(name) is None}
        rounds = preset.rounds if self.on else min(preset.rounds, 5)
        self.trials = Trials(rounds, 0.0, self.left_out)
        devices = self.module.device_count() if self.on else 1
        other = ((device.index or 0) + 1) % devices
        self.there = torch.device(device.type, other) if self.on else device
        self.across = "devices" if devices > 1 else "one device" if self.on else "processes"
        self.named = f"x{devices}" if devices > 1 else ""
        self.salts = count(1)
        #: Variables of the other processes.
        self.environment: Mapping[str, str] = {}
        self._near = list[Side]()
        self._far = list[Far]()
        self._settled = dict[Callable[..., object], float]()

    @property
    def releases(self) -> dict[str, str]:
        """Return the releases of the libraries that are measured as well."""
        packages = packages_distributions()
        return {x: version(packages[x][0]) for x in PEERS if x not in self.absent and x in packages}

    @property
    def near(self) -> Side:
        """Return the side in this process."""
        if not self._near:
            self._near.append(Side(self.device))
        return self._near[0]

    @property
    def far(self) -> Far:
        """Return the first side that gives; start another process if the last one ended."""
        if not self._far or self._far[0].process.poll() is not None:
            self._far[:1] = [self.started(self.there)]
        return self._far[0]

    def started(self, device: torch.device) -> Far:
        """Return one more process."""
        return Far(device, self.environment)

    def owners(self, case: Case) -> list[Far]:
        """Return the sides that give a case; more than one only within `several`."""
        return [self.far, *self._far[1 : case.owners]]

    @contextmanager
    def several(self, most: int) -> Iterator[None]:
        """Start processes on the same device for cases of up to so many owners; end them."""
        more = [self.started(self.there) for _ in range(most - 1)]
        self._far = [self.far, *more]
        try:
            yield
            self.apart()  # no reader maps the memory of a process that ends
        finally:
            for one in more:
                one.close()
            del self._far[1:]

    def meet(self, case: str, nbytes: int) -> None:
        """Let each owner give its rows of a case, and this side take them."""
        self.apart()
        owners = self.owners(ALL_CASES[case])
        for number, one in enumerate(owners):
            one.begin("give", case, nbytes, number)
        raw = [one.end() for one in owners]
        self.near.take(case, nbytes, *raw)
        self.change()

    def apart(self) -> None:
        """Let all sides release their memory."""
        self._settled.clear()
        for side in self._near:
            side.drop()
        if self._far:
            self.far.do("drop")
        for one in self._far[1:]:
            one.do("drop")

    def change(self) -> None:
        """Write other bytes to move."""
        salt = next(self.salts)
        owners = self.owners(self.near.case)
        for one in owners:
            one.begin("change", salt)
        self.near.expect(salt)
        for one in owners:
            one.end()

    def forget(self) -> None:
        with suppress(RuntimeError):
            self.apart()
        for one in self._far:
            one.close()
        for side in self._near:
            side.channel.close()
        self._near = []
        self._far = []
        super().forget()

    def rows(
        self, fields: Row, nbytes: int, methods: list[Method], compared_with: Mapping[str, str]
    ) -> list[Row]:
        """Return a row for each method, with other bytes in each round."""
        used = set[str]()

        def ready(method: Method) -> None:
            if method.name in used:
                used.clear()
                self.change()
            used.add(method.name)
            method.prepare()

        made = [method._replace(prepare=partial(ready, method)) for method in methods]
        return self.compared(fields, nbytes, made, compared_with)

    def compared(
        self, fields: Row, nbytes: int, methods: list[Method], compared_with: Mapping[str, str]
    ) -> list[Row]:
        """Yield a row for each method, compared with another one if ``compared_with`` names it."""
        many = self.trials.rounds * (5 if self.on and nbytes < _SMALL else 1)
        trials = replace(self.trials, rounds=many)
        rows = trials.rows({**fields, "across": self.across}, nbytes, methods, compared_with)
        for row in rows:
            if row["backend"].startswith(tuple(compared_with.values())):
                for name in compared_with:
                    row.pop(name, None)
            if self.on:  # the host's time does not measure a device's work
                row.pop("cpu_us_per_mib")
        return rows

    def method(
        self,
        name: str,
        call: Callable[[], object],
        right: Callable[[], bool],
        host_clock: bool = False,
    ) -> Method:
        """Return a call as a method, checked each time.

        It is timed on a device, or with ``host_clock`` until the host knows the end.
        """
        seen = list[bool]()

        def run() -> Sample:
            sample = self._sample(call, host_clock)
            seen.append(right())
            return sample

        return Method(name, run, right=lambda: all(seen))

    def _sample(self, call: Callable[[], object], host_clock: bool) -> Sample:
        flying = list[object]()

        def once(_: int = 0) -> None:
            flying.append(call())

        def ended() -> None:
            for one in flying:
                if isinstance(one, Pull):  # raises if its rows are not published
                    one.synchronize()
            flying.clear()
            self.module.synchronize()

        def whole() -> None:
            once()
            ended()

        if host_clock or not self.on:
            self.module.synchronize()
            return timed(whole)
        if call not in self._settled:
            self._settled[call] = self.timer.settle(once, 1)
        sample = self.timer.sample(once, 0, self._settled[call])
        ended()
        return Sample(sample.elapsed / 1e6, sample.host / 1e6)
