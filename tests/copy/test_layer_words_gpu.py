# SPDX-License-Identifier: Apache-2.0
"""Waits for layers that a CUDA graph has captured, with loads under way while it is replayed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from support.device_cases import DEVICE, delay, settle
from support.waits import LIMIT

from portakv.copy.layer_words import LayerWords
from portakv.errors import TransferError, Unsupported
from portakv.runtime.streams import CONNECTIONS, completion
from portakv.runtime.transfer import Completion, Transfer

pytestmark = pytest.mark.gpu

LAYERS = 4


class Model:
    """A graph that copies the value of each layer, after its wait."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.words = LayerWords(DEVICE, LAYERS, limit)
        self.rows = torch.zeros(LAYERS, dtype=torch.int64, device=DEVICE)
        self.seen = torch.zeros_like(self.rows)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            assert self.words.is_captured
            for layer in range(LAYERS):
                self.words.wait(layer)
                self.seen[layer].copy_(self.rows[layer])
        assert not self.words.is_captured
        self.end: torch.cuda.Event = torch.cuda.Event()
        # No kernel is loaded while a replay waits: that may wait for the replay.
        delay(torch.cuda.current_stream(DEVICE), 1)
        self.rows[0].fill_(0)
        settle(DEVICE)

    def replay(self) -> None:
        self.graph.replay()
        self.end.record()

    def ends(self) -> bool:
        """Return whether the replay ends in time."""
        until = time.monotonic() + LIMIT
        while not self.end.query():
            if time.monotonic() > until:
                return False
            time.sleep(1e-3)
        return True

    def writes(self, value: int, stream: torch.cuda.Stream, late: bool = True) -> list[Transfer]:
        """Return the ends of writes of the layers, which a stream makes late."""
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        made = []
        with torch.cuda.stream(stream):
            for layer in range(LAYERS):
                if late:
                    delay(stream, 2_000_000)
                self.rows[layer].fill_(value)
                made.append(Transfer([completion(DEVICE, stream)]))
        return made


class Held:
    """Work of the host that ends when a test says so."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.error: TransferError | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.over.is_set()

    def wait(self) -> None:
        self.over.wait(LIMIT)


def held_layers() -> tuple[list[Held], Sequence[Transfer]]:
    held = [Held() for _ in range(LAYERS)]
    return held, [Transfer([Completion(pendings=(each,))]) for each in held]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_each_replay_waits_for_the_copies_of_its_step(guard: bool) -> None:
    """Without the waits it sees what was there before."""
    model = Model()
    stream = torch.cuda.Stream(DEVICE)
    wrong = 0
    for value in range(1, 31):
        model.words.begin()
        model.words.follow(model.writes(value, stream))
        model.words.commit()
        if not guard:
            model.words.rest()
        model.replay()
        assert model.ends()
        wrong += model.seen.tolist() != [value] * LAYERS
        settle(DEVICE)
    assert (wrong == 0) is guard


def test_replays_without_a_load_wait_for_nothing() -> None:
    model = Model()
    for _ in range(2):
        model.replay()
        assert model.ends()
        model.words.begin()
        model.words.commit()


def test_what_the_host_ends_after_the_replay_began() -> None:
    """Layer by layer, by a copy that is issued while the replay waits; then an error."""
    model = Model()
    held, ends = held_layers()
    model.words.begin()
    model.words.follow(ends)
    model.words.commit()
    model.replay()
    stream = torch.cuda.Stream(DEVICE)
    for layer, each in enumerate(held[:-1]):
        with torch.cuda.stream(stream):
            model.rows[layer].fill_(7)
        stream.synchronize()
        assert not model.end.query()
        each.over.set()
    held[-1].error = TransferError("its owner is gone")
    assert model.ends()
    assert not model.words.expired
    assert model.seen.tolist() == [7] * (LAYERS - 1) + [0]


def test_a_word_that_nothing_raises_ends_the_replay_at_the_limit() -> None:
    """The next step waits again."""
    model = Model(limit=0.05)
    held, ends = held_layers()
    model.words.begin()
    model.words.follow(ends)
    model.words.commit()
    model.replay()
    assert model.ends()
    assert model.words.expired
    for each in held:
        each.over.set()
    stream = torch.cuda.Stream(DEVICE)
    model.words.begin()
    model.words.follow(model.writes(3, stream))
    model.words.commit()
    model.replay()
    assert model.ends()
    assert not model.words.expired


def test_closing_ends_the_replay() -> None:
    model = Model()
    held, ends = held_layers()
    model.words.begin()
    model.words.follow(ends)
    model.words.commit()
    model.replay()
    model.words.close()
    assert model.ends()
    assert model.words.expired
    for each in held:
        each.over.set()


def test_layers_that_are_issued_while_the_replay_waits() -> None:
    """No host is waited for: the stream that copies a layer raises its word."""
    model = Model()
    stream = torch.cuda.Stream(DEVICE)
    for value in range(1, 11):
        model.words.begin()
        began = time.monotonic()
        model.replay()
        for layer in range(LAYERS):
            with torch.cuda.stream(stream):
                delay(stream, 200_000)
                model.rows[layer].fill_(value)
                end = Transfer([completion(DEVICE, stream)])
            seconds = time.monotonic() - began
            assert not model.end.query(), (value, layer, model.words.expired, seconds)
            model.words.issued(layer, end)
        model.words.commit()
        assert model.ends()
        assert not model.words.expired
        assert model.seen.tolist() == [value] * LAYERS


def test_a_copy_that_never_comes_ends_the_replay_at_the_limit() -> None:
    model = Model(limit=0.05)
    model.words.begin()
    model.replay()
    assert model.ends()
    assert model.words.expired
    model.words.commit()


def test_streams_that_share_one_queue_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTIONS, "1")
    with pytest.raises(Unsupported, match=CONNECTIONS):
        LayerWords(DEVICE, LAYERS)
