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
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import in_bytes
from portakv.errors import StoreBusy, StoreError
from portakv.storage import image, slots, table
from portakv.storage.choose import choose
from portakv.storage.engine import Request
from portakv.storage.files import cause_of, check_folder, form_in, lock, open_file, unusable
from portakv.storage.form import BlockForm, Range

HELP = "what lies in a folder of a block store: show, check or wipe it"
DESCRIPTION = """\
show: the forms of blocks in a folder of a disk tier: model, dtype, layers, heads,
block size, slots in use and allocated, bytes, and the process that has the folder
open. The table has the first 8 digits of a form's name, --json all. check: reads
and verifies every image. wipe: removes the stores in it, of whatever version, or
that of one form, DIR/FORM; asks before, unless --yes. Exit code 1 if an image
fails or a form cannot be read. A folder that is open is neither checked nor wiped."""

#: Files of a store, also of former versions, as they are removed: the one that is locked goes last.
_FILES = ("form.json", "form.json.lock", "order", "table", "slots")
_TEXTS = ("form", "model", "dtype")
_NUMBERS = ("layers", "heads", "block_size", "used", "slots", "bytes", "failed")
_COLUMNS = (*_TEXTS, *_NUMBERS)
LATE = 1.0  # seconds until a bar of progress is shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("action", choices=("show", "check", "wipe"))
    parser.add_argument("folder", metavar="DIR", help="a folder that was given to `Disk`")
    parser.add_argument("--yes", action="store_true", help="wipe without a question")


def run(asked: argparse.Namespace) -> int:
    """Show, check or wipe. Raises `StoreError` if there is no store, `StoreBusy` if one is open."""
    with _usable(asked.folder):
        stores = _stores(asked.folder)
        if not stores:
            raise StoreError(
                f"Block stores in {asked.folder} were asked for, and none was found. Pass a folder "
                f"that `Disk` was given."
            )
        if asked.action == "wipe" and not asked.yes:
            size = in_bytes(sum(map(_bytes, stores)))
            forms = "1 form" if len(stores) == 1 else f"{len(stores)} forms"
            print(f"Wipe {forms} of blocks in {asked.folder}, {size}? [y/N] ", file=sys.stderr)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise StoreError("Stores were to be wiped, but nobody agreed; nothing was touched.")
        with nullcontext() if asked.action == "show" else _claimed(stores[0].parent):
            act = {"show": _shown, "check": _checked, "wipe": _wiped}[asked.action]
            found = [_told(act, store) for store in stores]
    if asked.json:
        print_json({"folder": asked.folder, "stores": found})
    else:
        _print(found)
    return 1 if any(one.get("why") for one in found) else 0


@contextmanager
def _usable(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        missing = "there is no such folder"
        if os.path.isdir(folder):
            missing = "no file can be made there"
        why = {
            FileNotFoundError: missing,
            NotADirectoryError: "that is no folder",
            PermissionError: f"this user may not use {error.filename or 'it'}",
        }.get(type(error), f"{error.filename or 'it'} cannot be used: {cause_of(error)}")
        raise StoreError(
            f"Block stores in {folder} were asked for, but {why}. Pass a folder that `Disk` was "
            f"given."
        ) from error


def _stores(folder: str) -> list[Path]:
    """The folders of forms in a folder, or that one if it is of a form."""
    if "://" in folder:
        raise StoreError(
            f"{folder} was asked for. A remote tier is not looked at here, only folders of disks; "
            f"its provider's tools list it, and `Remote(...).wipe()` empties it."
        )
    place = Path(os.path.abspath(folder))
    if not place.exists() and re.fullmatch("[0-9a-f]{8,31}", place.name):
        # The table has the first digits of a form's name.
        named = [store for store in place.parent.glob(f"{place.name}*") if _is_store(store)]
        place = named[0] if len(named) == 1 else place
    names = sorted(os.listdir(place))
    if _is_store(place) and not {"form.json", "slots"}.isdisjoint(names):
        return [place]
    return [store for name in names if _is_store(store := place / name)]


def _is_store(place: Path) -> bool:
    named = re.fullmatch("[0-9a-f]{32}", place.name) is not None
    return named and (place.is_dir() or place.is_symlink())


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """As a store, so that none is opened meanwhile; raises `StoreBusy`."""
    held = slots.claim(folder)
    try:
        yield
        if not [*filter(_is_store, folder.iterdir())]:  # all were wiped
            (folder / "lock").unlink()
    finally:
        os.close(held)


def _told(act: Callable[[Path], dict[str, Any]], store: Path) -> dict[str, Any]:
    """What an act on a store found, or why it could not."""
    why: StoreError
    try:
        check_folder(store)
        return act(store)
    except StoreError as error:
        why = error
    except OSError as error:
        why = unusable(store, error)
    return {"form": store.name, "bytes": _bytes(store), "why": [str(why)]}


def _print(found: Sequence[dict[str, Any]]) -> None:
    names = [name for name in _COLUMNS if any(name in one for one in found)]
    columns = [
        Column(name.replace("_", " "), whole=name != "model", right=name in _NUMBERS)
        for name in names
    ]
    print_table(columns, [[_cell(name, one.get(name)) for name in names] for one in found])
    for process in sorted({one["open_in"] for one in found if one.get("open_in", "-") != "-"}):
        print(f"The folder is open in {process}.")
    for one in found:
        for why in one.get("why", ()):
            print(f"{one['form']}, {why}")


def _cell(name: str, value: Any) -> str:
    """Return what a table says for a value of a store."""
    if value is None:
        return "-"
    if name == "form":
        return str(value)[:8]
    if name == "bytes":
        return in_bytes(value)
    if name in ("layers", "heads"):
        return _range(value)
    return str(value)


def _range(part: Range) -> str:
    """Return layers or heads of a model: their number, or which of them a part is."""
    first, past, of = part
    return str(of) if past - first == of else f"{first}-{past - 1} of {of}"


def _shown(store: Path) -> dict[str, Any]:
    """What a store's files tell, without opening it: another process may have it."""
    form = form_in(store)
    with os.fdopen(open_file(store / "slots"), "rb") as file:
        count = os.fstat(file.fileno()).st_size // form.image_bytes
    keys = set[bytes]()
    for slot, record in enumerate(table.records_in(store, form, count)):
        # A recovery believes the same records.
        if record[table.SEGMENTS] and image.checksum(record[:-1], slot) == record[-1]:
            keys.add(record[: table.GENERATION].tobytes())
    found = {"used": len(keys), "slots": count, "bytes": _bytes(store)}
    return {"form": store.name, **asdict(form), **found, "open_in": _open_in(store.parent)}


def _checked(store: Path) -> dict[str, Any]:
    """Every image of a store, read and verified; keys are shortened."""
    form = form_in(store)
    failed = list[str]()
    row = np.frombuffer(mmap.mmap(-1, form.image_bytes), np.uint8)
    with (
        closing(choose()[0]) as engine,
        closing(slots.Slots(store, form, None, engine, track=with_bar)) as opened,
    ):
        keys = [*opened.index]
        for key in with_bar(keys, f"checking {store.name[:8]}"):
            if (place := opened.pin(key)) is None:
                continue
            slot, told = place
            at = slot * opened.form.image_bytes
            [moved] = engine.run([Request(opened.fd, at, row.ctypes.data, len(row), False)])
            why = os.strerror(-moved) if moved < 0 else _wrong(row, form, told)
            if why:
                failed.append(f"slot {slot}, key {key.hex()[:8]}...: {why}")
            opened.unpin(place)
        found = {"form": store.name, "model": form.model, "slots": opened.count, "used": len(keys)}
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
    found = {"form": store.name, "bytes": _bytes(store)}
    held = lock(store / "slots")
    if held < 0:
        raise StoreBusy("What a process began before it was killed has not landed; try again soon.")
    for name in _FILES:
        (store / f"{name}.new").unlink(missing_ok=True)
        (store / name).unlink(missing_ok=True)
    size = os.fstat(held).st_size  # given back bit by bit, since it may take a while
    for end in with_bar(range(size, -1, -max(1, size // 100)), f"wiping {store.name[:8]}"):
        os.ftruncate(held, end)
    os.close(held)
    with suppress(OSError):  # it holds what is not a store's
        store.rmdir()
    return found


def _bytes(store: Path) -> int:
    if store.is_symlink():  # what it leads to is not the store's
        return 0
    return sum(file.lstat().st_blocks * 512 for file in store.glob("*"))


def _open_in(folder: Path) -> str:
    """The process that has claimed a folder, which is not claimed for that."""
    try:
        with os.fdopen(open_file(folder / "lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return "-"
    except BlockingIOError:
        return slots.holder(folder)
    return "-"


def with_bar(items: Sequence[Any], what: str) -> Iterator[Any]:
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
    page = np.frombuffer(mmap.mmap(-1, slots.PAGE), np.uint8)
    engine, said = choose([(page.ctypes.data, slots.PAGE)])
    trial = BlockForm(
        "a trial", "uint8", 1, (slots.PAGE,), 1, (0, 1, 1), (0, 1, 1), "block layer page"
    )
    with _usable(folder), closing(engine):
        stores = [_told(_shown, store) for store in _stores(folder)]
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            made = slots.Slots(Path(inside, trial.name), trial, trial.image_bytes, engine)
            made.take(bytes(32))  # a file without slots does not show whether O_DIRECT works
            made.close()
        free = shutil.disk_usage(folder).free
    registered = engine.name == "ring" and not engine.notes
    found: dict[str, Any] = {"folder": folder, "engine": engine.name}
    found["engines"] = [asdict(one) for one in said]
    found |= {
        "registered": registered,
        "o_direct": made.direct,
        "alignment": slots.PAGE,
        "free": free,
    }
    if as_json:
        print_json({**found, "stores": stores})
        return 0
    other = {"ring", "threads"}.difference(one.name for one in said)
    why = "PORTAKV_IO forces the other" if os.environ.get("PORTAKV_IO") else "the other comes first"
    for text in (*said, *(f"{name}: not asked, {why}" for name in other)):
        print_prose(f"{text}.")
    direct = "past the page cache" if made.direct else "by the page cache, O_DIRECT is refused"
    print_prose(f"{engine.name} serves {folder}, {direct}, in multiples of {slots.PAGE:,} bytes.")
    told = "registered with the kernel" if registered else "not registered"
    print_prose(f"Its memory is {told}; {in_bytes(free)} are free in the folder.")
    if stores:
        print()
        _print(stores)
    return 0
