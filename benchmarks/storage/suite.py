# SPDX-License-Identifier: Apache-2.0
"""Share settings, peers and a temporary folder among the parts of the storage benchmark."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import torch

from portakv_benchmarks.host.suite import GB, HOST_PRESETS, KB, MB, Bench
from portakv_benchmarks.shared.files import message
from portakv_benchmarks.shared.trials import Trials

VERSION = "from importlib.metadata import version; print(version('lmcache'))"


@dataclass(frozen=True, slots=True)
class StoragePreset:
    """Set the amount of measurement; sizes in bytes."""

    sizes: tuple[int, ...]  # of a slot
    nbytes: int  # of one trial
    rounds: int
    pause: float  # seconds before each trial
    slots: int  # of a table that is read at start
    nodes: int  # of a graph
    loads: int  # urgent ones in a round
    remote: int  # objects of 1 MB
    layered: int  # bytes that go to the device layer by layer, on a CPU a sixteenth
    layers: int = 32
    # Blocks of a call, and the bytes of each, of loads from the host tier to the device.
    waits: tuple[tuple[int, int], ...] = ((8, 2 * MB), (1000, 2 * MB), (3000, 640 * KB))
    # Blocks of a call, and the bytes of each, of loads through a store server.
    served: tuple[tuple[int, int], ...] = ((1, 2 * MB), (8, 2 * MB), (128, MB))

    @property
    def usual(self) -> int:
        """Return the size with the most measurements: 1 MB, if requested."""
        return MB if MB in self.sizes else self.sizes[0]

    @property
    def tiered(self) -> tuple[int, int]:
        """Return the sizes of the blocks of a tier that is measured next to its engine."""
        return self.usual, 2 * self.usual

    def slots_of(self, size: int) -> int:
        """Return the number of slots of one trial, a number that fio's 8 threads share evenly."""
        return max(8, self.nbytes // size // 8 * 8)


STORAGE_PRESETS: Mapping[str, StoragePreset] = {
    "full": StoragePreset((256 * KB, MB, 4 * MB), GB // 4, 9, 1.2, 250_000, 10_000, 40, 64, 4 * GB),
    "quick": StoragePreset((MB,), GB // 8, 3, 1.2, 50_000, 4000, 20, 16, GB),
    "tiny": StoragePreset(
        (256 * KB,),
        2 * MB,
        *(1, 0.0, 200, 100, 2, 2, 256 * MB, 4),
        ((8, 256 * KB),),
        ((2, 256 * KB),),
    ),
}


class StorageBench(Bench):
    """The device, the folder and the installed peers: fio and a Python with LMCache."""

    def __init__(
        self,
        device: torch.device,
        preset: StoragePreset,
        folder: Path,
        peers: Mapping[str, str | None],  # programs: fio, and a Python with LMCache
    ) -> None:
        super().__init__(device, HOST_PRESETS["tiny"])
        self.absent = {}
        self.installed = dict[str, str]()
        self.sizes = preset
        self.trials = Trials(preset.rounds, preset.pause, self.left_out)
        self.fio = peers["fio"] or shutil.which("fio")
        self.lmcache = peers["lmcache"] or (sys.executable if find_spec("lmcache") else None)
        commands = {"fio": self.fio and [self.fio, "--version"]}
        commands["lmcache"] = self.lmcache and [self.lmcache, "-c", VERSION]
        for name, words in commands.items():
            if words:
                self.installed[name] = message(words).removeprefix("fio-")
            else:
                self.absent[name] = "not installed; see --fio and --lmcache-python"
        self.folder = Path(mkdtemp(prefix="portakv-bench-", dir=folder))

    @property
    def releases(self) -> dict[str, str]:
        """Return the release of each peer, by name."""
        return self.installed

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
