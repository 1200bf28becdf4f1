# SPDX-License-Identifier: Apache-2.0
"""`portakv store` and `portakv explain --storage`: inspect a folder of a disk tier, or serve it.

The commands print its stores, verify them, remove them, or print how a tier reads and writes them.
`portakv store serve` is the process that serves the blocks to the engines of a host.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from portakv.arguments import invalid
from portakv.cli.console import Report, installing, print_json, print_prose, print_rows
from portakv.cli.sides import in_bytes, read_bytes
from portakv.core.xxh3 import checksum
from portakv.errors import InvalidTerms, PeerError, StoreBusy, StoreError
from portakv.runtime.resources import fcntl, require_linux
from portakv.storage import image
from portakv.storage.form import BlockForm, Range
from portakv.storage.io.base import Request
from portakv.storage.io.choose import choose
from portakv.storage.tiers import folder as slots
from portakv.storage.tiers.folder import (
    PAGE,
    cause_of,
    check_folder,
    claim,
    form_in,
    holder,
    lock,
    open_file,
    unusable,
)

if TYPE_CHECKING:
    from portakv.serving.kv_events import EventPublisher
    from portakv.serving.server.server import StoreServer

HELP = "show, check or wipe the block stores in a folder, or serve it to engines"
DESCRIPTION = """\
show: the forms of blocks in a folder of a disk tier: model, dtype, layers, heads,
block size, slots in use and allocated, bytes, and the process that has the folder
open. The table has the first 8 digits of a form's name, --json all. check: reads
and verifies every image. wipe: removes the stores in it, of any version, or the
store of one form, DIR/FORM; it asks for confirmation, unless --yes. Exit code 1 if
an image fails or a form cannot be read. A folder that is open is neither checked
nor wiped. serve: keeps the blocks of engines in the folders, one for each device,
until it gets SIGTERM or Ctrl-C; a second one for a folder stands by. The engines
of this host find it by the first folder."""

#: Files of a store, also of former versions, in the order of removal: the locked file is last.
_FILES = ("form.json", "form.json.lock", "order", "table", "slots")
_TEXTS = ("form", "model", "dtype", "encoding")
_NUMBERS = ("layers", "heads", "block_size", "used", "slots", "bytes", "failed")
_COLUMNS = (*_TEXTS, *_NUMBERS)
Item = TypeVar("Item")
LATE = 1.0  # seconds until a progress bar appears
#: Seconds between two looks whether this process serves.
LOOK = 0.25
_ENDS = (signal.SIGTERM, signal.SIGINT)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("action", choices=("show", "check", "wipe", "serve"))
    parser.add_argument("folder", metavar="DIR", nargs="+", help="a folder of a `Disk` tier")
    parser.add_argument("--yes", action="store_true", help="wipe without confirmation")
    sizes = {
        "host": "of host memory that cache blocks, 0 for none (4G)",
        "staging": "of host memory for transfers (1G)",
        "capacity": "of all folders together (64G)",
    }
    for name, what in sizes.items():
        read = partial(read_bytes, least=0 if name == "host" else 1)
        parser.add_argument(f"--{name}", type=read, metavar="N", help=f"serve: bytes {what}")
    parser.add_argument(
        "--bucket", metavar="URL", help="serve: an object store of blocks, s3://bucket/prefix"
    )
    parser.add_argument(
        "--bucket-options", metavar="JSON", help="serve: its options, such as the endpoint"
    )
    texts = {
        "metrics": ("HOST:PORT", "answer Prometheus there, such as 127.0.0.1:9464"),
        "events": ("ENDPOINT", "publish blocks to routers there, such as tcp://127.0.0.1:5557"),
        "event-replays": ("ENDPOINT", "send routers the events that they have missed from there"),
        "event-topic": (
            "TEXT",
            "the topic of the events, such as kv@POD@MODEL for llm-d (default: empty)",
        ),
    }
    for name, (metavar, what) in texts.items():
        parser.add_argument(f"--{name}", metavar=metavar, default="", help=f"serve: {what}")


def _bucket_options(words: str) -> dict[str, Any]:
    """Return a JSON object. Raises `InvalidTerms`, which shows no part of the text."""
    try:
        made = json.loads(words)
    except ValueError:
        made = None
    if not isinstance(made, dict):
        raise InvalidTerms(
            "Expected --bucket-options to be a JSON object, got another text. Correct it."
        )
    return made


def run(args: argparse.Namespace) -> int:
    """Show, check or wipe, or serve. Raise `StoreError` without a store, `StoreBusy` for an open
    store."""
    require_linux("`portakv store`")
    if args.action == "serve":
        return _serve(args)
    if len(args.folder) > 1:
        args.misunderstood(f"Expected one folder for {args.action}, got {len(args.folder)}.")
    (args.folder,) = args.folder
    with _usable(args.folder):
        stores = _stores(args.folder)
        if not stores:
            raise StoreError(
                f"Expected block stores in {args.folder}, got none. Pass a folder of a `Disk` tier."
            )
        if args.action == "wipe" and not args.yes:
            size = in_bytes(sum(map(_bytes, stores)))
            forms = "1 form" if len(stores) == 1 else f"{len(stores)} forms"
            print(f"Wipe {forms} of blocks in {args.folder}, {size}? [y/N] ", file=sys.stderr)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise StoreError(
                    "Expected y to wipe the stores, got another answer. No file changed."
                )
        with nullcontext() if args.action == "show" else _claimed(stores[0].parent):
            act = {"show": _shown, "check": _checked, "wipe": _wiped}[args.action]
            reports = [_report_of(act, store) for store in stores]
    if args.json:
        print_json({"folder": args.folder, "stores": reports})
    else:
        _print(reports)
    return 1 if any(report.get("why") for report in reports) else 0


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
            NotADirectoryError: "that is not a folder",
            PermissionError: f"this user may not use {error.filename or 'it'}",
        }.get(type(error), f"{error.filename or 'it'} cannot be used: {cause_of(error)}")
        raise StoreError(
            f"Expected block stores in {folder}, but {why}. Pass a folder of a `Disk` "
            f"tier, or make it first."
        ) from error


def _stores(folder: str) -> list[Path]:
    """Return the folders of forms in a folder, or the folder if it is that of a form."""
    if "://" in folder:
        raise StoreError(
            f"Expected a folder of a disk, got {folder}. List a remote tier with the tools of its "
            f"provider; `Remote(...).wipe()` empties it."
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
    """Claim the folder, so that no store opens it meanwhile. Raise `StoreBusy` if one has."""
    claimed = claim(folder)
    try:
        yield
        if not [*filter(_is_store, folder.iterdir())]:  # every store was wiped
            (folder / "lock").unlink()
    finally:
        os.close(claimed)


def _report_of(act: Callable[[Path], Report], store: Path) -> Report:
    """Return the report of an act on a store, or why it failed."""
    why: StoreError
    try:
        check_folder(store)
        return act(store)
    except StoreError as error:
        why = error
    except OSError as error:
        why = unusable(store, error)
    return {"form": store.name, "bytes": _bytes(store), "why": [str(why)]}


def _print(reports: Sequence[Report]) -> None:
    # The encoding of raw forms is empty.
    filled = {name for one in reports for name, value in one.items() if value not in (None, "")}
    names = [name for name in _COLUMNS if name in filled]
    titles = [name.replace("_", " ") for name in names]
    numbers = [name.replace("_", " ") for name in _NUMBERS]
    print_rows(
        titles,
        [[_cell(name, one.get(name)) for name in names] for one in reports],
        prose=["model"],
        right=numbers,
    )
    processes = {one.get("open_in", "-") for one in reports} - {"-"}
    for process in sorted(processes):
        print(f"The folder is open in {process}.")
    for one in reports:
        for why in one.get("why", ()):
            print(f"{one['form']}, {why}")


def _cell(name: str, value: Any) -> str:
    """Return the text of a store's value in a table."""
    if value is None:
        return "-"
    if name == "form":
        return str(value)[:8]
    if name == "encoding":
        return str(value) or "raw"
    if name == "bytes":
        return in_bytes(value)
    if name in ("layers", "heads"):
        return _range(value)
    return str(value)


def _range(part: Range) -> str:
    """Return layers or heads of a model: their number, or the range of a part."""
    first, past, of = part
    return str(of) if past - first == of else f"{first}-{past - 1} of {of}"


def _shown(store: Path) -> Report:
    """Return the contents of a store's files without opening it: another process may have it."""
    form = form_in(store)
    with os.fdopen(open_file(store / "slots"), "rb") as file:
        count = os.fstat(file.fileno()).st_size // form.image_bytes
    keys = set[bytes]()
    for slot, record in enumerate(slots.records_in(store, form, count)):
        # A recovery accepts the same records.
        if record[slots.SEGMENTS] and checksum(record[:-1], slot) == record[-1]:
            keys.add(record[: slots.GENERATION].tobytes())
    return {
        "form": store.name,
        **asdict(form),
        "used": len(keys),
        "slots": count,
        "bytes": _bytes(store),
        "open_in": _open_in(store.parent),
    }


def _checked(store: Path) -> Report:
    """Read and verify every image of a store; the report shortens keys."""
    form = form_in(store)
    failed = list[str]()
    row = np.frombuffer(mmap.mmap(-1, form.image_bytes), np.uint8)
    with (
        closing(choose()[0]) as engine,
        closing(slots.Slots(store, form, None, engine, track=with_bar)) as opened,
    ):
        keys = [*opened.index]
        for key in with_bar(keys, f"checking {store.name[:8]}"):
            (place,) = opened.pin([key])
            if place is None:
                continue
            slot, expected = place
            at = slot * opened.form.image_bytes
            [moved] = engine.run([Request(opened.fd, at, row.ctypes.data, len(row), False)])
            why = os.strerror(-moved) if moved < 0 else _fault(row, form, expected)
            if why:
                failed.append(f"slot {slot}, key {key.hex()[:8]}...: {why}")
            opened.unpin(place)
        count = opened.count
    return {
        "form": store.name,
        "model": form.model,
        "encoding": form.encoding,
        "slots": count,
        "used": len(keys),
        "bytes": _bytes(store),
        "failed": len(failed),
        "why": failed,
    }


def _fault(row: image.Row, form: BlockForm, expected: image.Header) -> str:
    """Return why an image differs from the index's entry; empty if it does not."""
    header = image.header(row, form)
    if isinstance(header, str):
        return header
    if header != expected:
        return "its header is another block's"
    right = image.verify(row, form, expected.checksums, expected.generation)
    return "" if right else "its payload does not match its checksums"


def _wiped(store: Path) -> Report:
    report: Report = {"form": store.name, "bytes": _bytes(store)}
    slots_file = lock(store / "slots")
    if slots_file < 0:
        raise StoreBusy("A killed process has writes that are not complete. Try again soon.")

    for name in _FILES:
        (store / f"{name}.new").unlink(missing_ok=True)
        (store / name).unlink(missing_ok=True)

    # Release the space in steps, since it may take a while.
    size = os.fstat(slots_file).st_size
    for end in with_bar(range(size, -1, -max(1, size // 100)), f"wiping {store.name[:8]}"):
        os.ftruncate(slots_file, end)
    os.close(slots_file)
    with suppress(OSError):  # the folder has files that are not a store's
        store.rmdir()
    return report


def _bytes(store: Path) -> int:
    if store.is_symlink():  # its target is not part of the store
        return 0
    return sum(file.lstat().st_blocks * 512 for file in store.glob("*"))


def _open_in(folder: Path) -> str:
    """Return the process that has claimed a folder, without claiming it; ``-`` for none."""
    try:
        with os.fdopen(open_file(folder / "lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return "-"
    except BlockingIOError:
        return holder(folder)
    return "-"


def with_bar(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items. On a terminal rich shows the progress, if it takes more than a second."""
    began = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - began > LATE and sys.stderr.isatty():
            with suppress(ImportError):  # without rich there is no bar
                from rich.console import Console
                from rich.progress import track

                yield from track(items[done:], what, console=Console(stderr=True))
                return


def explain_folder(folder: str, as_json: bool) -> int:
    """Print how a disk tier reads and writes a folder, and its stores. May raise `StoreError`."""
    require_linux("A block store on a disk")
    page = np.frombuffer(mmap.mmap(-1, PAGE), np.uint8)
    engine, decisions = choose([(page.ctypes.data, PAGE)])
    trial = BlockForm("a trial", "uint8", 1, (PAGE,), 1, (0, 1, 1), (0, 1, 1), "block layer page")
    with _usable(folder), closing(engine):
        stores = [_report_of(_shown, store) for store in _stores(folder)]
        direct = False
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            why = slots.no_space_in(Path(inside))
            if not why:
                made = slots.Slots(Path(inside, trial.name), trial, trial.image_bytes, engine)
                made.take(bytes(32))  # only a file with slots shows whether O_DIRECT works
                direct = made.direct
                why = "" if made.health.shortage is None else made.health.shortage.why
                made.close()
        free = shutil.disk_usage(folder).free
    registered = engine.name == "ring" and not engine.notes
    if as_json:
        report: Report = {
            "folder": folder,
            "engine": engine.name,
            "engines": [asdict(decision) for decision in decisions],
            "registered": registered,
            "o_direct": direct,
            "alignment": PAGE,
            "free": free,
            "why": why,
            "stores": stores,
        }
        print_json(report)
        return 1 if why else 0

    other = {"ring", "threads"}.difference(decision.name for decision in decisions)
    unused = "the other engine comes first"
    if os.environ.get("PORTAKV_IO"):
        unused = "PORTAKV_IO forces the other engine"
    for text in (*decisions, *(f"{name}: not tested, {unused}" for name in other)):
        print_prose(f"{text}.")
    if why:
        print_prose(f"{folder} cannot store blocks: {why}. Free space there, or pass another.")
    else:
        how = "bypassing the page cache"
        if not direct:
            how = "through the page cache, since O_DIRECT is rejected"
        print_prose(f"{engine.name} serves {folder}, {how}, in multiples of {PAGE:,} bytes.")
    memory = "registered with the kernel" if registered else "not registered"
    print_prose(f"Its memory is {memory}; {in_bytes(free)} are free in the folder.")
    if stores:
        print()
        _print(stores)
    return 1 if why else 0


def _serve(args: argparse.Namespace) -> int:
    """Serve folders until a signal ends it.

    Raises `InvalidTerms` for wrong terms, `StoreError` for a folder that cannot be used, or
    without the packages of the server, `PeerError` for an address that is in use, and `Unsupported`
    for metrics without their package.
    """
    given = {name: getattr(args, name) for name in ("host", "staging", "capacity", "bucket")}
    if args.bucket_options is not None:
        given["bucket_options"] = _bucket_options(args.bucket_options)
    check_installed("portakv store serve")
    from portakv.serving.local import StoreTerms
    from portakv.serving.server.server import StoreServer

    others = {name: value for name, value in given.items() if value is not None}
    terms = StoreTerms.of({"folder": (*args.folder,), **others})
    with ExitStack() as stack:
        ended = stack.enter_context(_until_a_signal())
        events = events_of(args, stack)
        store_server = stack.enter_context(StoreServer(terms, events=events))
        if args.metrics:
            _answer_prometheus(args.metrics, store_server, stack)
        served = store_server.serves
        _print_serving(store_server, args.json)
        while not ended:
            time.sleep(LOOK)
            if store_server.serves != served:
                served = store_server.serves
                _print_serving(store_server, args.json)
    return 0


def events_of(args: argparse.Namespace, stack: ExitStack) -> EventPublisher | None:
    """Return what publishes events to routers until the stack ends; None without an endpoint.

    Raises `PeerError` for an endpoint that cannot be bound.
    """
    if not args.events:
        return None
    from portakv.serving.kv_events import EventPublisher

    made = EventPublisher(args.events, args.event_replays, args.event_topic)
    stack.callback(made.close)
    return made


def _answer_prometheus(address: str, store_server: StoreServer, stack: ExitStack) -> None:
    """Answer Prometheus at an address, until the stack ends."""
    from portakv.graph.meter import Collector

    host, _, port = address.rpartition(":")
    collector = Collector(store_server)
    from prometheus_client import CollectorRegistry, start_http_server

    if not host or not port.isdigit() or int(port) >= 1 << 16:
        raise invalid("--metrics", "HOST:PORT", address)
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise PeerError(
            f"Expected an address at which Prometheus can be answered, got {address}: {error}. "
            f"Pass an address of this host and a free port."
        ) from None
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


def _print_serving(store_server: Any, as_json: bool) -> None:
    """Print whether this process serves."""
    folder = store_server.place.name
    if as_json:
        print_json({"folder": folder, "serves": store_server.serves})
    elif store_server.serves:
        terms = store_server.terms
        sizes = f"{in_bytes(terms.host)} of host memory, {in_bytes(terms.staging)} of staging"
        bucket = "" if terms.bucket is None else f", and the bucket {terms.bucket}"
        print_prose(
            f"This process serves {folder} to the engines of this host, with {sizes}{bucket}."
        )
    else:
        print_prose(f"Another process serves {folder}. This one stands by.")
    # A service's output is read by others, line by line.
    print(end="", flush=True)


@contextmanager
def _until_a_signal() -> Iterator[list[int]]:
    """Yield the signals that have come, each of which ends the process in order.

    No event: its lock may be held by the thread that waits, in which the handler runs.
    """
    ended = list[int]()
    before = {number: signal.signal(number, lambda sent, _: ended.append(sent)) for number in _ENDS}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_installed(command: str) -> None:
    """Raise `StoreError` if a package that a command needs of `portakv.serving` is missing, and
    `Unsupported` on another system than Linux."""
    require_linux(f"`{command}`")
    for name in ("msgspec", "zmq"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise StoreError(
                f"Expected {name} for `{command}`, got: {error}. {installing('serving')} brings it."
            ) from None
