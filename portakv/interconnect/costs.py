# SPDX-License-Identifier: Apache-2.0
"""The table of measured costs by which a strategy is chosen: look-up, and its file in the cache.

One file serves one kind of device, driver and torch. A file that is missing, corrupt or of another
device is not an error: the default rule then picks strategies, and the table's origin says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from portakv.core.pick import ORDER, look_up
from portakv.runtime import cuda, kernel_cache
from portakv.runtime.bounded import Bounded, making
from portakv.runtime.devices import device_name

Measured = TypeVar("Measured")

DIRECTIONS = ("d2h", "h2d")

#: The format of the file and of the strategies' behaviour. A table of another format does not
#: count, and is measured again.
FORMAT = 2

_LEAST = 1e-12  # seconds of any copy
_MOST = 1 << 53  # runs or bytes: the core counts them in floating point

#: The files in which Linux has the version of NVIDIA's module, and of AMD's.
DRIVER_FILES = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")

Columns = Mapping[
    int, Sequence["Point"]
]  # by rising bytes of a run, each with rising numbers of runs


class TableError(ValueError):
    """A file is not a table. The message is the end of a sentence that says why."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement.

    Attributes:
        runs: the number of runs.
        seconds: the time until the runs arrived, without the host's part where it can be hidden.
        host_seconds: the time that the call occupied the host.
    """

    runs: int
    seconds: float
    host_seconds: float


@dataclass(frozen=True, eq=False)
class Table:
    """The measured costs of strategies on one kind of device.

    Attributes:
        device: the measured device; see `identity`.
        points: measurements by strategy and direction.
        left_out: strategies that were not measured, and why.
        emulated: the device was emulated, and its times mean nothing.
        took: seconds of measuring.
        whole: every point was measured within the allowed time.
        origin: the source of the table, as a sentence.
        timer: the kind of its times.
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
        """Return whether any strategy was measured."""
        return bool(self.points)

    @cached_property
    def words(self) -> dict[str, array[float]]:
        """The measurements of each direction, as the core reads them."""
        return {
            direction: sum(
                (_words_of(self.points.get((strategy, direction), {})) for strategy in ORDER),
                array("d"),
            )
            for direction in DIRECTIONS
        }

    @cached_property
    def addresses(self) -> dict[str, int]:
        """The addresses of the words of each direction."""
        return {direction: words.buffer_info()[0] for direction, words in self.words.items()}


def cost(columns: Columns, run_bytes: int, runs: int) -> tuple[float, float]:
    """Return the seconds of the device and of the host for one strategy in one direction.

    Between measurements seconds are linear: in the number of runs of one size, and for equal bytes
    in the number of runs. That is exact for costs that are a price for each run and each byte.
    """
    return look_up(_words_of(columns), run_bytes, runs)


def _words_of(columns: Columns) -> array[float]:
    """Return the measurements of one strategy in one direction as `native/core/pick.h` has them."""
    words = array("d", [len(columns)])
    for size, column in columns.items():
        words += array("d", [size, len(column)])
        for point in column:
            words += array("d", [point.runs, point.seconds, point.host_seconds])
    return words


def unmeasured(why: str) -> Table:
    """Return the table of a device without measurements. ``why``: the reason, as the end of a
    sentence."""
    origin = f"not measured, so that the default rule picks strategies: {why}"
    return Table({}, {}, whole=False, origin=origin)


def identity(device: torch.device) -> dict[str, str]:
    """Return the device's model, its driver and runtime, and torch: a table holds for these."""
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
    """Return the kernel module's version, else the CUDA version that the driver supports, else
    nothing."""
    module = DRIVER_FILES[torch.version.hip is not None]
    with suppress(OSError, UnicodeDecodeError):  # this system has no such file, or another text
        version = re.search(r"(?:^|\s)(\d+\.\d[\d.]*)", module.read_text())
        if version:
            return version[1]
    with suppress(ImportError):  # no bindings of the driver
        return str(cuda.driver_version())
    return ""


def path_for(device: Mapping[str, str]) -> Path:
    """Return the file of a device. Its folder need not exist."""
    words = json.dumps([FORMAT, dict(sorted(device.items()))])
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return kernel_cache.directory() / f"host-table-{digest}.json"


def store(table: Table) -> Path:
    """Write a table to its file, atomically, and use it from now on.

    Raises:
        OSError: the file cannot be written.
    """
    path = path_for(table.device)
    kernel_cache.write_atomically(path, json.dumps(as_json(table), indent=1).encode())
    forget()
    return path


def read(path: Path) -> Table:
    """Return the table in a file.

    Raises:
        TableError: the file cannot be read, or is not a table of this format.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise TableError("it is not JSON") from error
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT:
        raise TableError(f"its format is {number!r}, and this release reads {FORMAT}")
    try:
        return _parsed(content, path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TableError(f"its contents are damaged ({type(error).__name__}: {error})") from error


def as_json(table: Table) -> dict[str, Any]:
    """Return a table as its file has it."""
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
    """Return the table in a file's content. Raises `ValueError` and the like for wrong
    content."""
    points: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for name, by_direction in content["engines"].items():
        for direction, rows in by_direction.items():
            if direction not in DIRECTIONS:
                raise ValueError(f"direction {direction!r}")
            points[name, direction] = _columns(rows)
    device = {str(name): str(value) for name, value in content["device"].items()}
    left_out = {str(name): str(v) for name, v in content["left_out"].items()}
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


def _columns(rows: list[list[float]]) -> dict[int, list[Point]]:
    """Return the measurements in a file's rows, by rising bytes of a run."""
    columns: dict[int, list[Point]] = {}
    for size, runs, seconds, host_seconds in sorted(rows):
        point = Point(_count(runs), _time(seconds, _LEAST), _time(host_seconds))
        columns.setdefault(_count(size), []).append(point)
    for column in columns.values():
        if len({point.runs for point in column}) < len(column):
            raise ValueError("a point occurs twice")
    return columns


def _count(number: object) -> int:
    if type(number) is not int or not 1 <= number <= _MOST:
        raise ValueError(f"{number!r} is not a number of runs or bytes")
    return number


def _time(number: object, least: float = 0.0) -> float:
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(f"{number!r} is not a time")
    if not math.isfinite(number) or number < least:
        raise ValueError(f"{number!r} is not a time{' that a copy can take' if least else ''}")
    return float(number)


#: Measurements of each device by their subject: tables of strategies, and what `measured` adds.
_measurements: Bounded[tuple[torch.device, object], Any] = Bounded("measurements of devices", 512)


def costs_of(device: torch.device) -> Table:
    """Return the table of a device, read once in a process."""
    key = device, Table
    known = _measurements.get(key)
    if known is None:
        with making():
            known = _measurements.get_or_make(key, lambda: _load(device))
    return cast("Table", known)


def measured(device: torch.device, subject: object, measure: Callable[[], Measured]) -> Measured:
    """Return what a subject measures on a device, such as its costs; measured at the first call.

    Several threads may measure concurrently; all get the first result.
    """
    return cast("Measured", _measurements.get_or_make((device, subject), measure))


def forget() -> None:
    """Drop all measurements. The next look-up reads the files, or measures, again."""
    with making():
        _measurements.clear()


def _load(device: torch.device) -> Table:
    here = identity(device)
    path = path_for(here)
    command = "`portakv calibrate` measures"
    if not path.exists():
        return unmeasured(f"there is no table for this device in {path.parent}; {command} one")
    try:
        table = read(path)
        if table.device == here:
            return table
        why = f"it was measured on {dict(table.device)}, and this is {here}"
    except TableError as error:
        why = str(error)
    return unmeasured(f"{path} was ignored, since {why}; {command} anew")
