# SPDX-License-Identifier: Apache-2.0
"""`portakv store serve`: a process that keeps the blocks of the engines of a host."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from portakv.cli.console import installing, print_json, print_prose
from portakv.cli.sides import in_bytes
from portakv.errors import StoreError

#: Seconds between two looks whether this process serves.
LOOK = 0.25
_ENDS = (signal.SIGTERM, signal.SIGINT)


def serve(folders: Sequence[str], others: Mapping[str, object], as_json: bool) -> int:
    """Serve folders until a signal ends it.

    Args:
        others: other terms of the store, by their names in `StoreTerms`.

    Raises `InvalidTerms` for wrong terms, and `StoreError` for a folder that cannot be used, or
    without the packages of the keeper.
    """
    check_installed("portakv store serve")
    from portakv.serving.keeper_server import Keeper
    from portakv.serving.local import StoreTerms

    terms = StoreTerms.of({"folder": (*folders,), **others})
    with _until_a_signal() as ended, Keeper(terms) as keeper:
        served = False
        if not keeper.serves:
            _report(keeper, as_json)
        while not ended.wait(0.0 if keeper.serves != served else LOOK):
            if keeper.serves != served:
                served = keeper.serves
                _report(keeper, as_json)
    return 0


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
    """Raise `StoreError` if a package that a command needs of `portakv.serving` is missing."""
    for name in ("msgspec", "zmq", "xxhash"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise StoreError(
                f"Expected {name} for `{command}`, got: {error}. {installing('serving')} brings it."
            ) from None
