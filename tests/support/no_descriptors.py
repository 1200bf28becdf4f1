# SPDX-License-Identifier: Apache-2.0
"""Leave a process of tests without file descriptors, for a while or at random moments."""

from __future__ import annotations

import os
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep


def limit(above: int = 40) -> int:
    """Lower the limits of this process to so many descriptors above the highest; return it."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    most = highest + 1 + above
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def count(most: int) -> int:
    """Return how many descriptors below ``most`` are open, without a descriptor."""
    number = 0
    for descriptor in range(most):
        try:
            os.fstat(descriptor)
            number += 1
        except OSError:
            pass
    return number


@contextmanager
def left(spare: int) -> Iterator[None]:
    """Take all descriptors but so many."""
    held = list[int]()
    try:
        while True:
            held.append(os.eventfd(0))
    except OSError:
        pass
    for _ in range(spare):
        os.close(held.pop())
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


@contextmanager
def limited(spare: int = 0) -> Iterator[None]:
    """Let this process open so many further files."""
    lowest = os.dup(0)
    os.close(lowest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def taken_at_random(seed: int) -> Iterator[None]:
    """Take all descriptors at random moments, and give them back."""
    stop = threading.Event()
    draw = random.Random(seed)

    def take() -> None:
        while not stop.is_set():
            with left(0):
                sleep(draw.random() * 0.02)
            sleep(draw.random() * 0.02)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
