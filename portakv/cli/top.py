# SPDX-License-Identifier: Apache-2.0
"""`portakv top`: what moves now in a process: its links, tiers, pulls and copies."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.request import urlopen

from portakv.cli.console import print_json, print_rows
from portakv.cli.sides import in_bytes, in_time
from portakv.cli.store import check_installed
from portakv.errors import InvalidTerms, PeerError, StoreError
from portakv.graph.meter import METRICS, PREFIX, series_of

HELP = "show what moves now in a store server or an engine: links, tiers, pulls"
DESCRIPTION = """\
Reads the figures of a running process twice, and shows what has changed: bytes and
blocks a second, waits, tasks in flight. WHERE is the folder of a `portakv store
serve` of this user, the address of a channel that answers
(portakv.serving.watched.answer), or the URL of a metrics page, such as that of an
engine. On a terminal the table is shown again and again until Ctrl-C; else once.
Without --json, rows in which nothing moves are left out, unless --all is given."""

#: A line of a metrics page: name, labels, value.
_SAMPLE = re.compile(r"^(vllm:)?portakv_(\w+?)(?:\{(.*)\})?\s+([-+.\deEinfNa]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: Clears a terminal.
_CLEAR = "\033[H\033[2J"
_URLS = ("http://", "https://")
_LONGEST = 10.0  # seconds for a page
_MOST = 64 << 20  # bytes of a page

#: The values of a reading: name, series and labels.
Key: TypeAlias = tuple[str, str, frozenset[tuple[str, str]]]


class Reading(NamedTuple):
    """The values of a process at a time, in seconds."""

    at: float
    values: Mapping[Key, float]


class Row(NamedTuple):
    """What moves. Numbers are None where they mean nothing.

    Attributes:
        kind: link, tier, pull, copy, weights, server or engine.
        rate: bytes a second; each: blocks, copies, pulls or tokens a second.
        seconds: that one of these takes.
        waiting: bytes, or how many are in flight; wait: seconds of the oldest.
        note: in words.
    """

    kind: str
    name: str
    rate: float | None = None
    each: float | None = None
    seconds: float | None = None
    waiting: float | None = None
    wait: float | None = None
    note: str = ""

    @property
    def moves(self) -> bool:
        """Return whether anything moves or waits."""
        return any((self.rate, self.each, self.seconds, self.waiting, self.wait, self.note))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("where", metavar="WHERE", help="a folder, an address or a URL")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="between readings")
    parser.add_argument("--count", type=int, metavar="N", help="tables to show, then end")
    parser.add_argument("--all", action="store_true", help="show rows in which nothing moves, too")


def run(args: argparse.Namespace) -> int:
    """Show what moves. Raises `PeerError` for a process that cannot be read, and `StoreError` for a
    folder that no process serves."""
    if not 0.05 <= args.seconds <= 3600 or (args.count is not None and args.count < 1):
        raise InvalidTerms(
            "Expected --seconds from 0.05 to 3600 and --count of 1 or more, got others. Correct "
            "them."
        )
    live = sys.stdout.isatty() and not args.json and args.count is None
    tables = itertools.count() if live else range(args.count or 1)
    before = read(args.where)
    for _ in tables:
        time.sleep(args.seconds)
        now = read(args.where)
        rows = rows_of(before, now)
        before = now
        if args.json:
            print_json([row._asdict() for row in rows])
            continue
        if live:
            print(_CLEAR, end="")
        _print(args.where, [row for row in rows if args.all or row.moves])
        sys.stdout.flush()
    return 0


def read(where: str) -> Reading:
    """Return the values of a process now; raises as `run`."""
    values = _of_page(where) if where.startswith(_URLS) else _of_process(where)
    return Reading(time.monotonic(), values)


def _of_process(where: str) -> dict[Key, float]:
    """Return the values of a process that answers at a channel."""
    check_installed("portakv top")
    from portakv.serving import Place, watched

    address = where
    if not where.startswith("ipc://"):
        address = Place.of_folder(where).address() if Path(where).is_dir() else ""
        if not address:
            raise StoreError(
                f"Expected a folder that a process of this user serves, got {where}. Run `portakv "
                f"store serve` on it, or pass the URL of a metrics page."
            )
    return {
        (each.name, each.series, frozenset(each.labels.items())): each.value
        for each in watched.ask(address)
    }


def _of_page(url: str) -> dict[Key, float]:
    """Return the values of a metrics page."""
    try:
        text = read_page(url)
    except (OSError, ValueError, HTTPException) as error:
        raise PeerError(
            f"Expected a metrics page, got none from {url}: {error}. Check the address."
        ) from None
    values = values_in(text)
    if not values:
        raise PeerError(
            f"Expected figures whose names begin with {PREFIX}, got none from {url}. Pass the "
            f"page of a process that uses PortaKV."
        )
    return values


def read_page(url: str) -> str:
    """Return the text of a metrics page."""
    with urlopen(url, timeout=_LONGEST) as answer:
        page: bytes = answer.read(_MOST)
    return page.decode(errors="replace")


def values_in(text: str) -> dict[Key, float]:
    """Return the values of a metrics page, for all engines of a server together."""
    values = defaultdict[Key, float](float)
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        engine, name, labels, value = match.groups()
        known, series = series_of(f"engine_{name}" if engine else name)
        if known not in METRICS:  # an engine has figures of tiers, too
            known, series = series_of(name)
        if known in METRICS and series != "bucket":
            own = {*METRICS[known].labels, "store"}
            pairs = frozenset(pair for pair in _LABEL.findall(labels or "") if pair[0] in own)
            values[known, series, pairs] += float(value)
    return dict(values)


# --- what has changed -----------------------------------------------------------------------------


class _Grown:
    """How much the values of metrics have grown between two readings, in a second."""

    def __init__(self, before: Reading, now: Reading) -> None:
        seconds = max(1e-9, now.at - before.at)
        self._now = now.values
        self._grown = dict[Key, float]()
        for key, value in now.values.items():
            more = value - before.values.get(key, 0.0)
            # A process that was started again counts from 0.
            self._grown[key] = (value if more < 0 else more) / seconds

    def by(self, labels: Sequence[str], name: str, series: str = "") -> dict[str, float]:
        """Return the growth of a metric a second, by the values of labels."""
        return sums_of(self._grown, labels, name, series)

    def levels(self, labels: Sequence[str], name: str) -> dict[str, float]:
        """Return the values of a gauge now, by the values of labels."""
        return sums_of(self._now, labels, name)

    def mean(self, labels: Sequence[str], name: str) -> dict[str, float]:
        """Return the mean seconds of a histogram, of those that ended between the readings."""
        numbers = self.by(labels, name, "count")
        sums = self.by(labels, name, "sum")
        return {each: sums[each] / many for each, many in numbers.items() if many and each in sums}


def sums_of(
    values: Mapping[Key, float], labels: Sequence[str], name: str, series: str = ""
) -> dict[str, float]:
    """Return the sums of a metric by the values of labels, after the store's name if it has one."""
    sums = defaultdict[str, float](float)
    for (each, kind, pairs), value in values.items():
        if (each, kind) == (name, series):
            texts = dict(pairs)
            own = " ".join(texts.get(label, "") for label in labels).strip()
            if "store" in texts:
                own = f"{texts['store']}: {own}".strip()
            sums[own] += value
    return dict(sums)


class _Kind(NamedTuple):
    """Rows by the values of labels: the figure of each column.

    Attributes:
        kind: of the rows.
        labels: whose values name a row.
        label: what a name has after them.
        rate, each: of counters.
        seconds: of a histogram.
        waiting, wait: of gauges.
    """

    kind: str
    labels: tuple[str, ...] = ()
    label: str = ""
    rate: str = ""
    each: str = ""
    seconds: str = ""
    waiting: str = ""
    wait: str = ""


_KINDS = (
    _Kind(
        "link",
        ("queue",),
        rate="queue_ran_bytes_total",
        waiting="queue_bytes",
        wait="queue_oldest_seconds",
    ),
    _Kind(
        "tier",
        ("tier", "op"),
        rate="tier_bytes_total",
        each="tier_blocks_total",
        seconds="tier_seconds",
    ),
    _Kind("pull", label="in flight", waiting="pulls_in_flight", wait="pull_oldest_seconds"),
    _Kind("pull", ("strategy",), rate="pull_bytes_total"),
    _Kind("pull", ("result",), each="pull_seconds/count", seconds="pull_seconds"),
    _Kind("offer", ("state",), each="offers_ended_total"),
    _Kind("weights", label="pulled", rate="weight_bytes_total"),
    _Kind("copy", ("strategy", "src", "dst"), rate="copy_bytes_total", each="copies_total"),
    _Kind("keeper", label="sessions", waiting="keeper_sessions"),
    _Kind("keeper", label="leases", waiting="keeper_leases", wait="keeper_oldest_lease_seconds"),
    _Kind("keeper", label="requests", waiting="keeper_requests"),
    _Kind("engine", label="promised tokens", each="engine_promised_tokens_total"),
    _Kind("engine", label="computed tokens", each="engine_computed_tokens_total"),
    _Kind("engine", label="landed blocks", each="engine_landed_blocks_total"),
    _Kind("engine", label="stored blocks", each="engine_stored_blocks_total"),
    _Kind("engine", label="failed loads", each="engine_failed_loads_total"),
)


def rows_of(before: Reading, now: Reading) -> list[Row]:
    """Return what moves between two readings of a process, by kind."""
    grown = _Grown(before, now)
    notes = _notes(grown)
    rows = list[Row]()
    for kind in _KINDS:
        each, _, series = kind.each.partition("/")
        columns = {
            "rate": grown.by(kind.labels, kind.rate),
            "each": grown.by(kind.labels, each, series),
            "seconds": grown.mean(kind.labels, kind.seconds),
            "waiting": grown.levels(kind.labels, kind.waiting),
            "wait": grown.levels(kind.labels, kind.wait),
        }
        for name in dict.fromkeys(name for values in columns.values() for name in values):
            figures: dict[str, Any] = {column: own.get(name) for column, own in columns.items()}
            title = f"{name} {kind.label}".strip()
            note = notes.get((kind.kind, title), "")
            rows.append(Row(kind.kind, title, note=note)._replace(**figures))

    for form, left in grown.levels(["url"], "remote_left_alone").items():
        rows.append(Row("bucket", form, note="left alone after failures" if left else ""))
    for folder, many in grown.levels(["folder", "state"], "disk_slots").items():
        if folder.endswith(" broken") and many:
            rows.append(Row("disk", folder.removesuffix(" broken"), note=f"{many:g} broken slots"))
    faults = {
        "disk_missing_slots": "full: {:g} slots have no space",
        "disk_lost": "its files were removed, moved or hidden",
    }
    for name, note in faults.items():
        for folder, many in grown.levels(["folder"], name).items():
            if many:
                rows.append(Row("disk", folder, note=note.format(many)))
    return rows


def _notes(grown: _Grown) -> dict[tuple[str, str], str]:
    """Return a note for each link with a task that runs too long, and for each tier with results
    that are neither hits nor misses."""
    slow = grown.levels(["queue"], "queue_slow")
    notes = {("link", name): "a task runs too long" for name, one in slow.items() if one}
    for text, many in grown.by(["tier", "op", "result"], "tier_blocks_total").items():
        name, _, result = text.rpartition(" ")
        if many and result not in ("hit", "miss"):
            note = f"{many:.3g}/s {result}"
            before = notes.get(("tier", name))
            notes["tier", name] = f"{before}, {note}" if before else note
    return notes


# --- as a table -----------------------------------------------------------------------------------

_NUMBERS = ("bytes/s", "each/s", "takes", "waiting", "oldest")
_PROSE = ("name", *_NUMBERS, "note")


def _print(where: str, rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    cells = [
        (
            row.kind,
            row.name,
            _cell(row.rate, _size),
            _cell(row.each, _number),
            _cell(row.seconds, in_time),
            _cell(row.waiting, _size if row.kind == "link" else "{:g}".format),
            _cell(row.wait, in_time),
            row.note,
        )
        for row in rows
    ]
    if cells:
        print_rows(("kind", *_PROSE), cells, _PROSE, _NUMBERS, f"{where}: what moves")
    else:
        print(f"{where}: nothing moves")


def _cell(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)


def _size(nbytes: float) -> str:
    return in_bytes(round(nbytes))


def _number(each: float) -> str:
    return f"{each:,.0f}" if each >= 100 else f"{each:.3g}"
