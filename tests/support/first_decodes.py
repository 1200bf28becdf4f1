# SPDX-License-Identifier: Apache-2.0
"""First decodes of messages by several threads, in forks of a process that has decoded nothing.

Each fork takes milliseconds, so many of them meet a fault that needs chance. `report` prints what
happened as JSON, for the tests of a process that has decoded messages before.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any

import msgspec

import portakv.migrate
import portakv.serving
from portakv.migrate import messages
from portakv.migrate.channel import BACK, answer_of
from portakv.migrate.messages import (
    VERSION,
    Answer,
    Described,
    Group,
    Handshake,
    Hello,
    Message,
)

#: The function of msgspec that reads the annotations of a Struct, while it builds its type
#: information.
READS = "get_class_annotations"
LIMIT = 1.0  # seconds that the first thread waits for the second one, which a lock may stop

_DESCRIBED = Described(
    Group((0, 1, 1), (0, 1, 1), (1,)),
    "token dim",
    (("uint8", (1,), (1,)),),
    (1,),
    ((0, 0, 0),),
    1,
)
HANDSHAKE = Handshake(bytes(16), (_DESCRIBED,), ())


class Inner(msgspec.Struct, frozen=True):
    """A part of `Foreign`, whose annotations are read while that is half built."""

    number: int


class Foreign(Message, frozen=True):
    """A message of a transport of another package."""

    inner: Inner


class Other(Message, frozen=True):
    """Another message of that package."""


FOREIGN = Foreign(Inner(7))


def answered(message: Message, kind: Any) -> object:
    """Decode the answer of a peer, as a channel does."""
    back = BACK.pack(VERSION, False, 1) + msgspec.msgpack.encode(message)
    return answer_of(back, "ipc:///somewhere", Hello("a model"), kind)


def decoded(message: Message, kind: Any) -> object:
    """Decode a message with msgspec alone, which builds the type information at the first call."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


def in_fork(run: Callable[[], object]) -> int:
    """Return how a fork that runs a function ended: 0, or the number of the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def half_built(decode: Callable[[], object], part: type) -> None:
    """Decode in one thread, and in another one as soon as the type information is half built.

    It is when msgspec reads the annotations of ``part``, which the message contains.
    """
    begun = threading.Event()
    over = threading.Event()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == READS and part in frame.f_locals.values():
            begun.set()
            over.wait(LIMIT)

    def first() -> None:
        sys.setprofile(look)
        try:
            decode()
        finally:
            sys.setprofile(None)
            begun.set()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    decode()
    over.set()
    thread.join()


def together(decode: Callable[[], object], threads: int = 8) -> None:
    """Decode in several threads together, which the interpreter changes often."""
    sys.setswitchinterval(1e-6)
    barrier = threading.Barrier(threads)

    def run() -> None:
        barrier.wait()
        decode()

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def structs() -> list[Any]:
    """Return each Struct of the library, after the import of its modules."""
    for package in (portakv.migrate, portakv.serving):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    known = list[Any]()
    new: list[Any] = [msgspec.Struct]
    while new:
        new = [kind for each in new for kind in each.__subclasses__()]
        known += new
    return [each for each in known if each.__module__.startswith("portakv.")]


def builds(kind: Any) -> bool:
    """Return True if a decoder of a type builds type information, because nothing has yet."""
    reads = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal reads
        reads += event == "call" and frame.f_code.co_name == READS

    sys.setprofile(look)
    try:
        msgspec.msgpack.Decoder(kind)
    finally:
        sys.setprofile(None)
    return reads > 0


def report(trials: int) -> None:
    """Print how forks ended, and the types whose information nothing has built."""
    handshake = partial(answered, HANDSHAKE, Handshake | Answer)
    unsealed = partial(messages.unsealed, messages.sealed(HANDSHAKE), Handshake)
    foreign = partial(answered, FOREIGN, Foreign | Other)
    bare = partial(decoded, FOREIGN, Foreign | Other)
    ends: dict[str, Any] = {
        "an answer": in_fork(partial(half_built, handshake, Described)),
        "sealed bytes": in_fork(partial(half_built, unsealed, Described)),
        "another package": in_fork(partial(half_built, foreign, Inner)),
        "msgspec alone": in_fork(partial(half_built, bare, Inner)),
        "by chance": [in_fork(partial(together, handshake)) for _ in range(trials)],
        "the first": builds(Foreign),
        "unbuilt": [each.__qualname__ for each in structs() if builds(each)],
        "structs": len(structs()),
    }
    print(json.dumps(ends))
