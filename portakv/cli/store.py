# SPDX-License-Identifier: Apache-2.0
"""`portakv store` and `portakv explain --storage`: what lies in a folder of a disk tier, whether it
is whole, and how it is read and written."""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import in_bytes
from portakv.errors import StoreBusy, StoreError
from portakv.storage import image
from portakv.storage.engine import Request, choose
from portakv.storage.form import BlockForm
from portakv.storage.slots import PAGE, SEGMENTS, Slots, form_in, holder, records_in

HELP = "what lies in a folder of a block store: show, check or wipe it"
DESCRIPTION = """\
show: the forms of blocks in a folder of a disk tier, the slots in use, their
bytes, and which process has it open. check: reads and verifies every image; exit
code 1 if one fails. wipe: removes the stores in it, of whatever version; asks
before, unless --yes. A store that is open is neither checked nor wiped."""

#: Files of a store, in the order in which they are removed: the one that is locked goes last.
_FILES = ("form.json", "form.json.lock", "order", "table", "slots")
_COLUMNS = ("form", "model", "user", "used", "slots", "bytes", "failed")
LATE = 1.0  # seconds until a bar of progress is shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("action", choices=("show", "check", "wipe"))
    parser.add_argument("folder", metavar="DIR", help="a folder that was given to `Disk`")
    parser.add_argument("--yes", action="store_true", help="wipe without a question")


def run(asked: argparse.Namespace) -> int:
    """Show, check or wipe. Raises `StoreError` if there is no store, `StoreBusy` if one is open."""
    act = {"show": _shown, "check": _checked, "wipe": _wiped}[asked.action]
    with _usable(asked.folder):
        stores = _stores(asked.folder)
        if asked.action == "wipe" and not asked.yes:
            size = in_bytes(sum(map(_bytes, stores)))
            print(f"Wipe {len(stores)} of {asked.folder}, {size}? [y/N] ", file=sys.stderr)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise StoreError("Stores were to be wiped, but nobody agreed; nothing was touched.")
        found = [act(store) for store in _with_bar(stores, asked.action)]
    if not found:
        raise StoreError(f"Block stores in {asked.folder} were asked for, and none was found.")
    if asked.json:
        print_json({"folder": asked.folder, "stores": found})
    else:
        _print(found)
    return 1 if any(one.get("failed") for one in found) else 0


@contextmanager
def _usable(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder} was asked for, but cannot be used: {error}.") from error


def _stores(folder: str) -> list[Path]:
    inside = sorted(x for x in Path(folder).glob("*") if x.is_dir() and not x.is_symlink())
    return [store for store in inside if re.fullmatch("[0-9a-f]{32}", store.name)]


def _print(found: Sequence[dict[str, Any]]) -> None:
    names = [name for name in _COLUMNS if name in found[0]]
    columns = [Column(name, right=name in _COLUMNS[3:]) for name in names]
    told = [one | {"bytes": in_bytes(one["bytes"])} for one in found]
    print_table(columns, [[str(one[name]) for name in names] for one in told])
    for one in found:
        for why in one.get("why", ()):
            print(f"{one['form']}, {why}")


def _shown(store: Path) -> dict[str, Any]:
    """What a store's files tell, without opening it: another process may have it."""
    form, lock = _form(store), _lock(store)
    if isinstance(lock, int):
        os.close(lock)
    counts = {
        "slots": (store / "slots").stat().st_size // form.image_bytes,
        "used": int(np.count_nonzero(records_in(store, form)[:, SEGMENTS])),
        "bytes": _bytes(store),
    }
    user = "nobody" if isinstance(lock, int) else f"process {lock}"
    return {"form": store.name, **asdict(form), **counts, "user": user}


def _checked(store: Path) -> dict[str, Any]:
    """Every image of a store, read and verified; keys are shortened."""
    form, failed = _form(store), list[str]()
    row = np.frombuffer(mmap.mmap(-1, form.image_bytes), np.uint8)
    with (
        closing(choose()[0]) as engine,
        closing(Slots(store, form, None, engine, track=_with_bar)) as slots,
    ):
        keys = [*slots.index]
        for key in _with_bar(keys, f"checking {store.name[:8]}"):
            if (place := slots.pin(key)) is None:
                continue
            slot, told = place
            at = slot * slots.form.image_bytes
            [moved] = engine.run([Request(slots.fd, at, row.ctypes.data, len(row), False)])
            why = os.strerror(-moved) if moved < 0 else _wrong(row, form, told)
            if why:
                failed.append(f"slot {slot}, key {key.hex()[:8]}...: {why}")
            slots.unpin(place)
        found = {"form": store.name, "model": form.model, "slots": slots.count, "used": len(keys)}
    return {**found, "bytes": _bytes(store), "failed": len(failed), "why": failed}


def _wrong(row: image.Row, form: BlockForm, told: image.Header) -> str:
    """Why an image is not what the index says; empty if it is."""
    said = image.header(row, form)
    if isinstance(said, str):
        return said
    if said != told:
        return "its header is another block's"
    right = image.verify(row, form, told.checksums, told.generation)
    return "" if right else "its payload is not what was sealed"


def _wiped(store: Path) -> dict[str, Any]:
    found, lock = {"form": store.name, "bytes": _bytes(store)}, _lock(store)
    if isinstance(lock, str):
        raise StoreBusy(f"{store} was to be wiped, but process {lock} has it open; end it first.")
    for name in _FILES:
        (store / f"{name}.new").unlink(missing_ok=True)
        (store / name).unlink(missing_ok=True)
    os.close(lock)
    with suppress(OSError):  # it holds what is not a store's
        store.rmdir()
    return found


def _bytes(store: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in store.glob("*"))


def _form(store: Path) -> BlockForm:
    try:
        return form_in(store)
    except StoreError as error:
        raise StoreError(f"{store} is of another release, or damaged. {error}") from None


def _lock(store: Path) -> int | str:
    """A descriptor with a store's lock, or the process that has it."""
    held = os.open(store / "slots", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    os.close(held)
    return holder(store)


def _with_bar(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items; on a terminal rich shows how far they are, if they take more than a second."""
    began = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - began > LATE and sys.stderr.isatty():
            with suppress(ImportError):
                from rich.console import Console
                from rich.progress import track

                yield from track(items[done:], what, console=Console(stderr=True))
                return


def explain_folder(folder: str, as_json: bool) -> int:
    """Print how a disk tier reads and writes a folder, and what lies there; raises `StoreError`."""
    page = np.frombuffer(mmap.mmap(-1, PAGE), np.uint8)
    engine, said = choose([(page.ctypes.data, PAGE)])
    trial = BlockForm("a trial", "uint8", 1, (PAGE,), 1, (0, 1, 1), (0, 1, 1), "block layer page")
    with _usable(folder), closing(engine), tempfile.TemporaryDirectory(dir=folder) as inside:
        slots = Slots(Path(inside), trial, trial.image_bytes, engine)
        slots.close()
        free, stores = shutil.disk_usage(folder).free, [_shown(one) for one in _stores(folder)]
    registered = engine.name == "ring" and not engine.notes
    found: dict[str, Any] = {"folder": folder, "engine": engine.name}
    found["engines"] = [asdict(one) for one in said]
    found |= {"registered": registered, "o_direct": slots.direct, "alignment": PAGE, "free": free}
    if as_json:
        print_json({**found, "stores": stores})
        return 0
    other = {"ring", "threads"}.difference(one.name for one in said)
    why = "PORTAKV_IO forces the other" if os.environ.get("PORTAKV_IO") else "the other comes first"
    for text in (*said, *(f"{name}: not asked, {why}" for name in other)):
        print_prose(f"{text}.")
    direct = "past the page cache" if slots.direct else "by the page cache, O_DIRECT is refused"
    print_prose(f"{engine.name} serves {folder}, {direct}, in multiples of {PAGE:,} bytes.")
    told = "registered with the kernel" if registered else "not registered"
    print_prose(f"Its memory is {told}; {in_bytes(free)} are free in the folder.")
    if stores:
        print()
        _print(stores)
    return 0
