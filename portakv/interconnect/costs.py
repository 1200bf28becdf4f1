# SPDX-License-Identifier: Apache-2.0
"""The table of measured costs for the choice of strategies: look-up, and its file in the cache.

There is one file for each kind of device, driver and torch. What is missing, corrupt or of another
device is no error: nothing is known then, the default rule picks strategies, and the origin says
why.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from portakv.registry.registry import OLD_NAMES
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import device_name

DIRECTIONS = ("d2h", "h2d")

#: Of the file, and of how strategies behave: a table of another format is measured anew.
FORMAT = 2

_LEAST = 1e-12  # seconds of any copy

#: Where Linux tells the version of NVIDIA's module, and of AMD's.
DRIVER_FILES = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")

Columns = Mapping[int, Sequence["Point"]]  # by rising bytes of a run, with rising numbers of runs


class TableError(ValueError):
    """Why a file is no table, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: so many runs, the seconds until they had landed, without what the host does
    first if that can be hidden, and the seconds that the call kept the host."""

    runs: int
    seconds: float
    host_seconds: float


@dataclass(frozen=True, eq=False)
class Table:
    """What strategies cost on one kind of device, as it was measured.

    Attributes:
        device: what it was measured on; see `identity`.
        points: measurements by strategy and direction.
        left_out: strategies that were not measured, and why.
        emulated: measured on an emulated device, whose times mean nothing.
        took: seconds of measuring.
        whole: every point was measured within the time that was allowed.
        origin: where it comes from, as a sentence.
        timer: what its times are.
    """

    device: Mapping[str, str]
    points: Mapping[tuple[str, str], Columns]
    left_out: Mapping[str, str] = field(default_factory=dict)
    emulated: bool = False
    took: float = 0.0
    whole: bool = True
    origin: str = "measured by this process"
    timer: str = ""

    @property
    def measured(self) -> bool:
        """Whether anything was measured."""
        return bool(self.points)

    def seconds(self, strategy: str, direction: str, run_bytes: int, runs: int) -> float | None:
        """Seconds that the device takes; None if a strategy was not measured."""
        columns = self.points.get((strategy, direction))
        return cost(columns, "seconds", run_bytes, runs) if columns else None

    def host_seconds(
        self, strategy: str, direction: str, run_bytes: int, runs: int
    ) -> float | None:
        """Seconds that a call keeps the host; None if a strategy was not measured."""
        columns = self.points.get((strategy, direction))
        return cost(columns, "host_seconds", run_bytes, runs) if columns else None


def cost(columns: Columns, what: str, run_bytes: int, runs: int) -> float:
    """The ``seconds`` or ``host_seconds`` of one strategy in one direction.

    Between measurements seconds are linear: in the number of runs of one size, and for equal bytes
    in how many runs they lie in. That is exact for what each run and each byte has its price.
    """
    sizes = list(columns)
    runs = max(1, runs)
    nbytes = max(1, run_bytes) * runs
    if run_bytes <= sizes[0]:  # narrower runs cost what the narrowest do, each
        return _along(columns[sizes[0]], what, runs)
    if run_bytes >= sizes[-1]:
        return _along(columns[sizes[-1]], what, nbytes / sizes[-1])
    at = bisect_left(sizes, run_bytes)
    narrow = sizes[at - 1]
    wide = sizes[at]
    share = (1 / narrow - 1 / run_bytes) / (1 / narrow - 1 / wide)
    first = _along(columns[narrow], what, nbytes / narrow)
    return first + share * (_along(columns[wide], what, nbytes / wide) - first)


def _along(column: Sequence[Point], what: str, wanted: float) -> float:
    """Seconds at a number of runs; straight on past the last one, level before the first one."""
    runs = [point.runs for point in column]
    seconds: list[float] = [getattr(point, what) for point in column]
    if wanted <= runs[0]:
        return seconds[0]
    if len(runs) == 1:
        return seconds[0] * wanted / runs[0]
    at = min(bisect_left(runs, wanted), len(runs) - 1)
    # Two measurements that are close to each other may fall; nothing gets cheaper by more runs.
    slope = max(0.0, seconds[at] - seconds[at - 1]) / (runs[at] - runs[at - 1])
    if wanted > runs[-1]:
        return seconds[-1] + max(slope, 0.5 * seconds[-1] / runs[-1]) * (wanted - runs[-1])
    return seconds[at - 1] + slope * (wanted - runs[at - 1])


def unmeasured(why: str) -> Table:
    """The table of a device that has none, for a reason: nothing is known of any strategy."""
    origin = f"not measured, so that the default rule picks strategies: {why}"
    return Table({}, {}, whole=False, origin=origin)


def identity(device: torch.device) -> dict[str, str]:
    """What a table is true for: the device's model, its driver and runtime, and torch."""
    driver = runtime = ""
    if device.type == "cuda":
        driver = installed_driver()
        runtime = torch.version.cuda or torch.version.hip or ""
    return {
        "type": device.type,
        "model": device_name(device),
        "driver": driver,
        "runtime": runtime,
        "torch": torch.__version__,
    }


def installed_driver() -> str:
    """The kernel module's version, else the CUDA version that the driver supports; or nothing."""
    module = DRIVER_FILES[torch.version.hip is not None]
    with suppress(OSError, UnicodeDecodeError):
        found = re.search(r"(?:^|\s)(\d+\.\d[\d.]*)", module.read_text())
        if found:
            return found[1]
    with suppress(ImportError):
        return str(_cuda_driver.driver_version())
    return ""


def path_for(device: Mapping[str, str]) -> Path:
    """The file of a device; its folder need not exist."""
    words = json.dumps([FORMAT, dict(sorted(device.items()))])
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return _kernel_cache.directory() / f"host-table-{digest}.json"


def store(table: Table) -> Path:
    """Write a table to its file, at once or not at all, and use it from now on.

    Raises:
        OSError: it cannot be written.
    """
    path = path_for(table.device)
    _kernel_cache.write_atomically(path, json.dumps(as_json(table), indent=1).encode())
    forget()
    return path


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        TableError: it cannot be read, or holds no table of this format.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TableError("it is no JSON") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise TableError(f"its format is {found!r}, and this release reads {FORMAT}")
    try:
        return _parsed(content, path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TableError(f"its contents are damaged ({type(error).__name__}: {error})") from error


def as_json(table: Table) -> dict[str, Any]:
    """A table as its file has it."""
    strategies: dict[str, dict[str, list[list[float]]]] = {
        strategy: {} for strategy, _ in table.points
    }
    for (strategy, direction), columns in table.points.items():
        strategies[strategy][direction] = [
            [size, p.runs, p.seconds, p.host_seconds] for size in columns for p in columns[size]
        ]
    return {
        "format": FORMAT,
        "device": dict(table.device),
        "emulated": table.emulated,
        "took_seconds": round(table.took, 3),
        "whole": table.whole,
        "timer": table.timer,
        "left_out": dict(table.left_out),
        "columns": ["run_bytes", "runs", "seconds", "host_seconds"],
        "engines": strategies,
    }


def _parsed(content: Mapping[str, Any], path: Path) -> Table:
    points: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for name, by_direction in content["engines"].items():
        strategy = OLD_NAMES.get(name, name)
        for direction, rows in by_direction.items():
            if direction not in DIRECTIONS:
                raise ValueError(f"direction {direction!r}")
            columns = points.setdefault((strategy, direction), {})
            for size, runs, seconds, host_seconds in sorted(rows):
                point = Point(_count(runs), _time(seconds, _LEAST), _time(host_seconds))
                columns.setdefault(_count(size), []).append(point)
            for column in columns.values():
                if len({p.runs for p in column}) < len(column):
                    raise ValueError("a point occurs twice")
    device = {str(name): str(value) for name, value in content["device"].items()}
    left_out = {OLD_NAMES.get(name, str(name)): str(v) for name, v in content["left_out"].items()}
    emulated = bool(content["emulated"])
    origin = f"measured on {device.get('model') or device.get('type', '?')}"
    return Table(
        device,
        points,
        left_out,
        emulated,
        _time(content["took_seconds"]),
        bool(content["whole"]),
        f"{origin}{', which is emulated' if emulated else ''} ({path})",
        str(content["timer"]),
    )


def _count(number: Any) -> int:
    if type(number) is not int or number < 1:
        raise ValueError(f"{number!r} is no number of runs or bytes")
    return number


def _time(number: Any, least: float = 0.0) -> float:
    if type(number) not in (int, float) or not math.isfinite(number) or number < least:
        raise ValueError(f"{number!r} is no time{' that a copy can take' if least else ''}")
    return float(number)


_tables: Bounded[torch.device, Table] = Bounded("tables of costs", 64)
_lock = threading.Lock()


def costs_of(device: torch.device) -> Table:
    """The table of a device, read once in a process."""
    with _lock:
        return _tables.get_or_make(device, lambda: _find(device))


def forget() -> None:
    """Read tables anew when they are next asked for."""
    with _lock:
        _tables.clear()


def _find(device: torch.device) -> Table:
    mine = identity(device)
    path = path_for(mine)
    command = "`portakv calibrate` measures"
    if not path.exists():
        return unmeasured(f"there is no table for this device in {path.parent}; {command} one")
    try:
        if (table := read(path)).device == mine:
            return table
        why = f"it was measured on {dict(table.device)}, and this is {mine}"
    except TableError as error:
        why = str(error)
    return unmeasured(f"{path} was ignored, since {why}; {command} anew")
