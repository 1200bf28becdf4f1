# SPDX-License-Identifier: Apache-2.0
"""A serving engine in small: blocks are allocated, appended to, stored, evicted, loaded and moved
in any order, against a dictionary of bytes."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from portakv_conformance.judging import Judge
from portakv_conformance.pattern import Guarded, guarded, pattern_bytes
from portakv_conformance.shapes import Workshop

from portakv import AdaptiveConnector, Index, KVView, Transfer, copy_blocks

pytestmark = pytest.mark.area("stateful")

LAYERS, BLOCKS, SIZE, HEADS, DIM = 2, 7, 4, 2, 8
ROW = LAYERS * 2 * HEADS * DIM * 2  # bytes of one token in all planes
_WAYS = ("layer | kv block token head dim", "layer kv | block head token dim")


class Engine(RuleBasedStateMachine):
    """Sequences of tokens in blocks. ``told`` is what each token of each sequence must hold."""

    judge: Judge
    home: Workshop

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(self.home.device)
        self.guards: list[Guarded] = []
        self.caches = [self._buffer(2 * BLOCKS * SIZE) for _ in range(LAYERS)]
        shape = (2, BLOCKS, SIZE, HEADS, DIM)
        self.layers = [cache.view(shape) for cache in self.caches]
        name = self.judge.subject.name
        self.connector = AdaptiveConnector(self.device, backend=name, kv_layout=_WAYS[0])
        self.connector.register_kv_caches(self.layers)
        self.free = list(range(BLOCKS))
        self.blocks: dict[int, list[int]] = {}  # sequence -> its blocks
        self.told: dict[int, list[bytes]] = {}  # sequence -> the bytes of each token
        self.stored: dict[int, tuple[torch.Tensor, list[bytes]]] = {}  # evicted ones, as chunks
        self.number = 0
        self.on_host = False

    def _buffer(self, rows: int) -> torch.Tensor:
        """Memory for so many rows of all heads, as fp16, between canaries."""
        made = guarded(
            rows * HEADS * DIM * 2, storage=len(self.guards), poison=True, device=self.device
        )
        self.guards.append(made)
        return made.payload().view(torch.float16)

    def _chunk(self, tokens: int) -> torch.Tensor:
        return self._buffer(2 * LAYERS * tokens).view(2, LAYERS, tokens, HEADS * DIM)

    def _slots(self, sequence: int, first: int, past: int) -> list[int]:
        blocks = self.blocks[sequence]
        return [blocks[t // SIZE] * SIZE + t % SIZE for t in range(first, past)]

    def _finish(self, transfer: Transfer) -> None:
        self.judge.finish(transfer)
        self.judge.examples += 1

    @precondition(lambda self: self.free)
    @rule(tokens=st.integers(1, 2 * SIZE), end=st.booleans())
    def append(self, tokens: int, end: bool) -> None:
        """New tokens of a new or the last sequence are written by a scatter, into new blocks."""
        sequence = max(self.blocks, default=0) + 1 if end or not self.blocks else max(self.blocks)
        known = len(self.told.get(sequence, []))
        own = self.blocks.setdefault(sequence, [])
        while len(own) * SIZE < known + tokens and self.free:
            own.append(self.free.pop())
        tokens = min(tokens, len(own) * SIZE - known)
        fresh = [self._bytes() for _ in range(tokens)]
        self.told.setdefault(sequence, []).extend(fresh)
        if not tokens:
            return
        chunk = self._chunk(tokens)
        chunk.copy_(_as_chunk(fresh).to(self.device))
        slots = [-1, *self._slots(sequence, known, known + tokens)]
        self._finish(self.connector.to_gpu(chunk, None, slots, 1))

    def _bytes(self) -> bytes:
        self.number += 1
        return pattern_bytes(self.judge.seed, self.number, ROW).tobytes()

    @precondition(lambda self: self.blocks)
    @rule(pick=st.integers(0, 5))
    def evict(self, pick: int) -> None:
        """A sequence is stored to a chunk and its blocks are given back."""
        sequence = sorted(self.blocks)[pick % len(self.blocks)]
        told = self.told.pop(sequence)
        if told:
            chunk = self._chunk(len(told))
            slots = torch.tensor(self._slots(sequence, 0, len(told)), dtype=torch.int32)
            self._finish(self.connector.from_gpu(chunk, None, slots))
            self.stored[sequence] = (chunk, told)
        self.free += self.blocks.pop(sequence)

    @precondition(lambda self: self.stored and self.free)
    @rule(pick=st.integers(0, 5))
    def reload(self, pick: int) -> None:
        """A stored sequence is loaded into whatever blocks are free, if they are enough."""
        sequence = sorted(self.stored)[pick % len(self.stored)]
        chunk, told = self.stored[sequence]
        needed = -(-len(told) // SIZE)
        if needed > len(self.free):
            return
        del self.stored[sequence]
        self.blocks[sequence] = [self.free.pop(0) for _ in range(needed)]
        self.told[sequence] = told
        slots = torch.tensor(self._slots(sequence, 0, len(told))).to(self.device)
        self._finish(self.connector.to_gpu(chunk, None, slots))

    @precondition(lambda self: self.free and any(self.blocks.values()))
    @rule(pick=st.integers(0, 5), which=st.integers(0, 5))
    def migrate(self, pick: int, which: int) -> None:
        """A block moves to a free one, all layers at once."""
        owners = [s for s in sorted(self.blocks) if self.blocks[s]]
        own = self.blocks[owners[pick % len(owners)]]
        place = which % len(own)
        target = self.free.pop(0)
        view = KVView(self.layers, _WAYS[0])
        name = self.judge.subject.name
        self._finish(copy_blocks(view, view, [own[place]], [target], backend=name))
        self.free.append(own[place])
        own[place] = target

    @precondition(lambda self: any(self.told.values()))
    @rule(pick=st.integers(0, 5))
    def convert(self, pick: int) -> None:
        """A sequence is read, through another layout's cache, as it was written."""
        owners = [s for s in sorted(self.told) if self.told[s]]
        sequence = owners[pick % len(owners)]
        told = self.told[sequence]
        blocks = self.blocks[sequence][: -(-len(told) // SIZE)]
        pairs = [
            tuple(self._buffer(len(blocks) * SIZE).view(-1, HEADS, SIZE, DIM) for _ in range(2))
            for _ in range(LAYERS)
        ]
        view, other = KVView(self.layers, _WAYS[0]), KVView(pairs, _WAYS[1])
        order = list(range(len(blocks)))[::-1]
        self._finish(
            self.judge.subject.copy(
                view, other, Index(blocks, step=SIZE), Index(order, step=SIZE), count=len(told)
            )
        )
        keys = torch.stack([torch.stack(pair) for pair in pairs]).cpu()
        for token, wanted in enumerate(told):
            block = order[token // SIZE]
            row = keys[:, :, block, :, token % SIZE].transpose(0, 1)
            assert _raw(row) == wanted, f"Sequence {sequence}, token {token} was converted wrong."

    @invariant()
    def every_token_holds_its_bytes(self) -> None:
        """Whatever happened, each token of each sequence holds what was written for it."""
        rows = torch.stack([layer.cpu() for layer in self.layers]).view(
            LAYERS, 2, BLOCKS * SIZE, HEADS, DIM
        )
        for sequence, told in self.told.items():
            for token, slot in enumerate(self._slots(sequence, 0, len(told))):
                found = _raw(rows[:, :, slot].transpose(0, 1))
                assert found == told[token], (
                    f"Sequence {sequence}, token {token} in slot {slot} does not hold its bytes."
                )
        for guard in self.guards[:LAYERS]:
            wrong = guard.broken()
            assert wrong is None, wrong


def _raw(row: torch.Tensor) -> bytes:
    """The bytes of one token ``[kv, layer, heads, dim]``."""
    raw: bytes = row.contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def _as_chunk(tokens: list[bytes]) -> torch.Tensor:
    """Tokens as a chunk ``[2, layers, tokens, heads * dim]`` on the host."""
    flat = torch.frombuffer(bytearray(b"".join(tokens)), dtype=torch.float16)
    return flat.view(len(tokens), 2, LAYERS, HEADS * DIM).permute(1, 2, 0, 3).contiguous()


def test_blocks_of_an_engine(judge: Judge, home: Workshop) -> None:
    """Through any sequence of appends, evictions, reloads and migrations, no token is lost."""
    if home.paged != _WAYS[0]:
        judge.declined.append(f"it takes no cache as {_WAYS[0]!r}, in which engines keep theirs")
        return
    machine = type("Engine", (Engine,), {"judge": judge, "home": home})
    hypothesis.seed(judge.seed)(machine)
    examples = max(settings().max_examples // 2, 10)
    run(machine, settings=settings(max_examples=examples, stateful_step_count=15))
