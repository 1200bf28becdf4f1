# SPDX-License-Identifier: Apache-2.0
"""`portakv store serve`: a process that keeps the blocks of the engines of a host."""

from __future__ import annotations

import argparse
import importlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from portakv.arguments import invalid
from portakv.cli.console import installing, print_json, print_prose
from portakv.cli.sides import in_bytes
from portakv.errors import PeerError, StoreError
from portakv.runtime.linux import require_linux

if TYPE_CHECKING:
    from portakv.serving.keeper_server import Keeper
    from portakv.serving.kv_events import EventPublisher

#: Seconds between two looks whether this process serves.
LOOK = 0.25
_ENDS = (signal.SIGTERM, signal.SIGINT)


class Watching(NamedTuple):
    """Where operators and routers watch a store; empty: nowhere.

    Attributes:
        metrics: the address and port for Prometheus.
        events: the endpoint to which routers subscribe.
        replays: the endpoint of events that a router has missed.
        topic: of the events.
    """

    metrics: str = ""
    events: str = ""
    replays: str = ""
    topic: str = ""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Watching:
        """Return what a command line names; see `add_watching`."""
        return cls(args.metrics, args.events, args.event_replays, args.event_topic)


NOWHERE = Watching()


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Watching`."""
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        default="",
        help="serve: answer Prometheus there, such as 127.0.0.1:9464",
    )
    parser.add_argument(
        "--events",
        metavar="ENDPOINT",
        default="",
        help="serve: publish blocks to routers there, such as tcp://127.0.0.1:5557",
    )
    parser.add_argument(
        "--event-replays",
        metavar="ENDPOINT",
        default="",
        help="serve: send routers the events that they have missed from there",
    )
    parser.add_argument(
        "--event-topic",
        metavar="TEXT",
        default="",
        help="serve: the topic of the events, such as kv@POD@MODEL for llm-d (default: empty)",
    )


def serve(
    folders: Sequence[str],
    others: Mapping[str, object],
    as_json: bool,
    watching: Watching = NOWHERE,
) -> int:
    """Serve folders until a signal ends it.

    Args:
        others: other terms of the store, by their names in `StoreTerms`.

    Raises `InvalidTerms` for wrong terms, `StoreError` for a folder that cannot be used, or
    without the packages of the keeper, `PeerError` for an address that is in use, and `Unsupported`
    for metrics without their package.
    """
    check_installed("portakv store serve")
    from portakv.serving.keeper_server import Keeper
    from portakv.serving.local import StoreTerms

    terms = StoreTerms.of({"folder": (*folders,), **others})
    with ExitStack() as stack:
        ended = stack.enter_context(_until_a_signal())
        events = events_of(watching, stack)
        keeper = stack.enter_context(Keeper(terms, events=events))
        if watching.metrics:
            _answer_prometheus(watching.metrics, keeper, stack)
        served = False
        if not keeper.serves:
            _report(keeper, as_json)
        while not ended.wait(0.0 if keeper.serves != served else LOOK):
            if keeper.serves != served:
                served = keeper.serves
                _report(keeper, as_json)
    return 0


def events_of(watching: Watching, stack: ExitStack) -> EventPublisher | None:
    """Return what publishes events to routers until the stack ends; None without an endpoint.

    Raises `PeerError` for an endpoint that cannot be bound.
    """
    if not watching.events:
        return None
    from portakv.serving.kv_events import EventPublisher

    made = EventPublisher(watching.events, watching.replays, watching.topic)
    stack.callback(made.close)
    return made


def _answer_prometheus(address: str, keeper: Keeper, stack: ExitStack) -> None:
    """Answer Prometheus at an address, until the stack ends."""
    from portakv.graph.prometheus import Collector

    host, _, port = address.rpartition(":")
    collector = Collector(keeper)
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


def _report(keeper: Any, as_json: bool) -> None:
    """Print whether this process serves."""
    folder = keeper.place.name
    if as_json:
        print_json({"folder": folder, "serves": keeper.serves})
    elif keeper.serves:
        terms = keeper.terms
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
def _until_a_signal() -> Iterator[threading.Event]:
    """Yield an event that a signal sets, which ends the process in order."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in _ENDS}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_installed(command: str) -> None:
    """Raise `StoreError` if a package that a command needs of `portakv.serving` is missing, and
    `Unsupported` on another system than Linux."""
    require_linux(f"`{command}`")
    for name in ("msgspec", "zmq", "xxhash"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise StoreError(
                f"Expected {name} for `{command}`, got: {error}. {installing('serving')} brings it."
            ) from None
