# SPDX-License-Identifier: Apache-2.0
"""A server in host memory and clients of it, in the process of a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch

from portakv import KVView
from portakv.serving import StoreClient, StoreServer, StoreTerms
from portakv.storage import BlockForm, prefix_keys
from support.waits import LIMIT

LAYOUT = "layer | block kv token head dim"
SIZE = 4
HEADS = 4
names = count()


def caches(
    blocks: int = 16, heads: int = HEADS, dim: int = 8, device: str | torch.device = "cpu"
) -> KVView:
    made = [
        torch.randint(-99, 99, (blocks, 2, SIZE, heads, dim), dtype=torch.int32, device="cpu")
        for _ in range(2)
    ]
    return KVView([each.to(device) for each in made], LAYOUT)


def same(one: KVView, other: KVView, blocks: int, heads: slice = slice(None)) -> bool:
    """Return whether the first blocks of a view are those of another one's heads."""
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(torch.equal(a[:blocks].cpu(), b[:blocks, :, :, heads].cpu()) for a, b in pairs)


class Host:
    """A server in host memory, and clients of it."""

    def __init__(self, stack: ExitStack, whole: KVView, rows: int, **terms: Any) -> None:
        self.stack = stack
        self.form = BlockForm.of(whole, "model")
        size = self.form.image_bytes
        self.engine = f"engine {os.getpid()} {next(names)}"
        sizes = {"host": rows * size, "staging": 2 * rows * size}
        self.store_server = stack.enter_context(
            StoreServer(StoreTerms(**{**sizes, **terms}), self.engine)
        )

    def join(
        self,
        view: KVView,
        heads: tuple[int, int] = (0, HEADS),
        device: Any = None,
        of: int = HEADS,
    ) -> StoreClient:
        form = BlockForm.of(view, "model", heads=(*heads, of))
        made = StoreClient(self.store_server.place, [form], self.engine, device)
        self.stack.enter_context(made)
        assert made.wait(LIMIT)
        return made


@contextmanager
def hosts() -> Iterator[Callable[..., Host]]:
    """Yield a function that makes a `Host`, which is closed at the end."""
    with ExitStack() as stack:

        def made(whole: KVView, rows: int = 16, **terms: Any) -> Host:
            return Host(stack, whole, rows, **terms)

        yield made


KEYS = prefix_keys(range(16 * SIZE), SIZE)
