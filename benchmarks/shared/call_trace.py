# SPDX-License-Identifier: Apache-2.0
"""Print what one call passes through: files entered, calls of Python, locks, thread switches.

Run ``python -m portakv_benchmarks.shared.call_trace`` for a repeated `from_gpu` and `copy_blocks`,
a host hit, a disk hit, an offer and a mapped pull. ``--functions`` lists what the caller's thread
enters. The owner of the pulled rows is a separate process.

Each operation was made before it is traced, so that nothing is made for the first time. Calls and
locks are those of one operation, the one with the fewest calls of several. A lock counts if it was
made by the library, or by a module of the standard library for it. A switch is voluntary: a thread
sleeps, and is woken later. Switches are means of operations that nothing traces.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from portakv_benchmarks.shared.switches import other_switches, own_switches, rest

if TYPE_CHECKING:  # it imports the library
    from portakv_benchmarks.shared.traced_calls import Operation

#: Operations before the first one that counts, operations that are traced, and operations whose
#: switches are counted.
WARM = 20
TRACED = 9
SWITCHED = 50


class Entered(NamedTuple):
    """A function of the library that a thread enters."""

    thread: int
    file: str  # relative to the package
    name: str


class Trace(NamedTuple):
    """What one operation passes through."""

    entered: list[Entered]
    calls: list[int]  # the thread of each call of Python, of any module
    locks: list[int]  # the thread of each lock that is taken


class Switches(NamedTuple):
    """Voluntary switches of one operation."""

    caller: float
    others: float  # of the process
    owner: float | None  # of the process that offers the rows of a pull


class CountedLock:
    """A lock that notes the threads that take it."""

    def __init__(self, lock: Any, note: Callable[[int], None]) -> None:
        self._lock = lock
        self._note = note

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken:
            self._note(threading.get_ident())
        return taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class Recorder:
    """Records calls of Python, and locks taken, of all threads that start after `follow`.

    ``root``: the folder of the files whose functions are recorded.
    """

    def __init__(self, root: Path) -> None:
        self._root = f"{root.resolve()}{os.sep}"
        self._files: dict[str, str | None] = {}  # names by file; None outside of the folder
        self._on = False
        self._trace = Trace([], [], [])

    @contextmanager
    def count_locks(self) -> Iterator[None]:
        """Count the locks that `threading` makes until the end of the context."""
        kinds = {name: getattr(threading, name) for name in ("Lock", "RLock")}
        for name, make in kinds.items():
            setattr(threading, name, partial(self._counted, make))
        try:
            yield
        finally:
            for name, make in kinds.items():
                setattr(threading, name, make)

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Follow the calls of threads that start until the end of the context."""
        threading.setprofile(self._event)
        try:
            yield
        finally:
            threading.setprofile(None)

    def record(
        self, operation: Callable[[], object], settle: Callable[[], object]
    ) -> tuple[Any, Trace]:
        """Return the result of an operation, and its trace.

        ``settle`` returns when no other thread works for the operation any more.
        """
        own = self._trace = Trace([], [], [])
        before = sys.getprofile()
        self._on = True
        try:
            sys.setprofile(self._event)
            try:
                result = operation()
            finally:
                sys.setprofile(before)
            # The caller's thread only waits from here on, by functions that do not count.
            caller = threading.get_ident()
            later = self._trace = Trace([], [], [])
            settle()
        finally:
            self._on = False
        own.entered.extend(each for each in later.entered if each.thread != caller)
        own.calls.extend(thread for thread in later.calls if thread != caller)
        own.locks.extend(thread for thread in later.locks if thread != caller)
        return result, own

    def _counted(self, make: Callable[[], Any]) -> CountedLock:
        return CountedLock(make(), self._note)

    def _note(self, thread: int) -> None:
        if self._on:
            self._trace.locks.append(thread)

    def _event(self, frame: Any, event: str, _argument: object) -> None:
        if not self._on or event != "call":
            return
        code = frame.f_code
        if code.co_filename == __file__:
            return
        thread = threading.get_ident()
        self._trace.calls.append(thread)
        file = self._file(code.co_filename)
        if file is not None:
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has only the second
            self._trace.entered.append(Entered(thread, file, name))

    def _file(self, path: str) -> str | None:
        """Return the name of a file of the folder; None for any other file."""
        if path not in self._files:
            whole = os.path.realpath(path)
            inside = whole.startswith(self._root)
            self._files[path] = whole.removeprefix(self._root) if inside else None
        return self._files[path]


def count_switches(operation: Operation, repeats: int, owner: Callable[[], int] | None) -> Switches:
    """Return the mean switches of an operation."""
    caller = 0
    rest()
    others = -other_switches()
    far = -owner() if owner else 0
    for _ in range(repeats):
        argument = operation.prepare()
        before = own_switches()
        result = operation.call(argument)
        caller += own_switches() - before
        operation.finish(result)
        rest()
    others += other_switches()
    far += owner() if owner else 0
    return Switches(caller / repeats, others / repeats, far / repeats if owner else None)


def trace_call(recorder: Recorder, operation: Operation, warm: int, traced: int) -> Trace:
    """Return the trace of an operation that has been made before, with the fewest calls."""
    for _ in range(warm):
        operation.finish(operation.call(operation.prepare()))
    traces = []
    for _ in range(traced):
        rest()
        result, trace = recorder.record(partial(operation.call, operation.prepare()), rest)
        traces.append(trace)
        operation.finish(result)
    return min(traces, key=lambda trace: len(trace.calls))


def figures(trace: Trace, switches: Switches, caller: int) -> dict[str, Any]:
    """Return the counts of an operation, and the functions that its caller's thread enters."""
    own = [each for each in trace.entered if each.thread == caller]
    files = [each.file for each in own]
    changes = sum(1 for before, now in zip(["", *files], files, strict=False) if before != now)
    functions: dict[str, list[str]] = {}
    for each in own:
        functions.setdefault(each.file, []).append(each.name)
    return {
        "files": len(functions),
        "files_of_all": len({each.file for each in trace.entered}),
        "changes": changes,
        "library_calls": len(own),
        "calls": trace.calls.count(caller),
        "calls_of_others": len(trace.calls) - trace.calls.count(caller),
        "locks": trace.locks.count(caller),
        "locks_of_others": len(trace.locks) - trace.locks.count(caller),
        "switches": round(switches.caller, 1),
        "switches_of_others": round(switches.others, 1),
        "switches_of_owner": None if switches.owner is None else round(switches.owner, 1),
        "functions": functions,
    }


def measure(
    device: torch.device, repeats: tuple[int, int, int], **owner: Any
) -> dict[str, dict[str, Any]]:
    """Return the figures of each operation, by name.

    ``repeats``: as `WARM`, `TRACED` and `SWITCHED`; ``owner``: ``start``, as for `operations`. The
    library is imported here, so that its locks count, unless the process has imported it before.
    """
    spec = find_spec("portakv")
    if spec is None or spec.origin is None:
        raise RuntimeError("Expected the package portakv, got none. Install it.")
    warm, traced, switched = repeats
    recorder = Recorder(Path(spec.origin).parent)
    with recorder.count_locks():
        cases = import_module("portakv_benchmarks.shared.traced_calls")
        with recorder.follow(), cases.operations(device, **owner) as made:
            traces = {x.name: trace_call(recorder, x, warm, traced) for x in made.operations}
        with cases.operations(device, **owner) as made:
            switches = {}
            for each in made.operations:
                for _ in range(warm):
                    each.finish(each.call(each.prepare()))
                switches[each.name] = count_switches(each, switched, made.owner_of(each))
    caller = threading.get_ident()
    return {name: figures(trace, switches[name], caller) for name, trace in traces.items()}


#: The columns of the table: a title, and the fields that a cell shows.
COLUMNS = {
    "files: caller, all": ("files", "files_of_all"),
    "changes of file": ("changes",),
    "library's calls": ("library_calls",),
    "calls: caller, others": ("calls", "calls_of_others"),
    "locks: caller, others": ("locks", "locks_of_others"),
    "switches: caller, others, owner": ("switches", "switches_of_others", "switches_of_owner"),
}


def cell(row: dict[str, Any], fields: Iterable[str]) -> str:
    """Return the figures of a cell; a figure that is None is left out."""
    return ", ".join(str(row[field]) for field in fields if row[field] is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table or JSON, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m portakv_benchmarks.shared.call_trace",
        description="Counts what one call passes through, once it has been made before.",
    )
    add = parser.add_argument
    add("--device", help="a torch device (default: the accelerator, if any)")
    add("--json", action="store_true", help="print one JSON value")
    add("--functions", action="store_true", help="list what the caller's thread enters, by file")
    add("--quick", action="store_true", help="trace each operation once, to try the command")
    args = parser.parse_args(argv)
    device = pick(args.device)
    results = measure(device, (3, 1, 3) if args.quick else (WARM, TRACED, SWITCHED))
    from portakv.cli.console import Column, print_json, print_table

    if args.json:
        print_json(results)
        return 0
    columns = [Column("one call", whole=True), *(Column(x, right=True) for x in COLUMNS)]
    rows = [
        [name, *(cell(row, fields) for fields in COLUMNS.values())] for name, row in results.items()
    ]
    print_table(columns, rows, f"what one call passes through, on {device}")
    if args.functions:
        for name, row in results.items():
            print(f"\n{name}")
            for file, names in row["functions"].items():
                print(f"  {file}: {', '.join(names)}")
    return 0


def pick(name: str | None) -> torch.device:
    """Make the named device current and return it; by default the accelerator, else the CPU."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(usual if name is None else name)
    if device.type == "cpu":
        return device
    module = torch.get_device_module(device)
    module.set_device(module.current_device() if device.index is None else device.index)
    return torch.device(device.type, module.current_device())


if __name__ == "__main__":
    sys.exit(main())
