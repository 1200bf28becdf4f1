# SPDX-License-Identifier: Apache-2.0
"""Hand rows over between a device and the host, in copies that the owner sends from staging
buffers: as between engines of two vendors, neither of which can map the other's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from secrets import token_bytes
from statistics import median
from typing import NamedTuple, TypeAlias

import torch

from portakv import KVView
from portakv.migrate import Shard, Ticket
from portakv.serving.handover import Handover, HandoverTerms
from portakv.serving.plan import Handovers, OfferJob, PullJob
from portakv_benchmarks.migration.cases import memory
from portakv_benchmarks.shared.harness import Row, Rows, short
from portakv_benchmarks.shared.shapes import POISON

HEADS = 8
DIM = 128
SIZES = (16, 64)  # tokens of a block of the owner, and of the reader
LEASE = 60.0
LIMIT = 60.0  # seconds
WORDS = 1024
LAYOUT = "layer | kv block token head dim"
#: Hands a prompt of so many tokens over, and returns the seconds.
Move: TypeAlias = "Callable[[Worker, Worker, int, int], float]"


class Case(NamedTuple):
    """A prompt, and how often it is handed over.

    Attributes:
        layers: of the model.
        tokens: of the prompt.
        rounds: of which the first one connects, and does not count.
    """

    layers: int
    tokens: int = 1025
    rounds: int = 6


class Worker:
    """The worker of an engine, with a cache on a device.

    Args:
        size: tokens of a block.
        offers: it offers rows; else it pulls them.
    """

    def __init__(self, device: torch.device, size: int, case: Case, offers: bool) -> None:
        self.size = size
        self._tokens = case.tokens
        used = -(-case.tokens // size)
        shape = (case.layers, 2, used + 1, size, HEADS, DIM)
        self.cache = memory(shape, torch.bfloat16, device)
        self.cache.view(torch.uint8).fill_(POISON)
        self.blocks = tuple(range(used, 0, -1))  # in an order of their own
        shard = Shard(KVView([*self.cache], LAYOUT), heads=(0, HEADS, HEADS))
        terms = HandoverTerms(expose="staging")
        self.handover = Handover([shard], "a model", terms, offers=offers, pulls=not offers)

    @property
    def rows(self) -> torch.Tensor:
        """Return the rows of the prompt ``[layer, kv, token, head, dim]``."""
        return self.cache[:, :, list(self.blocks)].flatten(2, 3)[:, :, : self._tokens]

    def write(self, rows: torch.Tensor) -> None:
        """Write the rows of a prompt."""
        for number, block in enumerate(self.blocks):
            some = rows[:, :, number * self.size : (number + 1) * self.size]
            self.cache[:, :, block, : some.shape[2]] = some.to(self.cache.device)

    def next_tokens(self) -> list[int]:
        """Return what each layer's attention to the rows makes the most likely next token.

        It computes with 64 bits, so that all devices agree.
        """
        rows = self.rows.double()
        device = rows.device
        drawn = torch.Generator(device="cpu").manual_seed(4)
        query = torch.randn(HEADS, DIM, generator=drawn, dtype=torch.float64, device="cpu")
        heads = torch.randn(
            WORDS, HEADS * DIM, generator=drawn, dtype=torch.float64, device="cpu"
        ).to(device)
        weights = torch.einsum("hd,lthd->lht", query.to(device), rows[:, 0]).softmax(-1)
        attended = torch.einsum("lht,lthd->lhd", weights, rows[:, 1]).flatten(1)
        tokens: list[int] = (attended @ heads.T).argmax(-1).tolist()
        return tokens

    def close(self) -> None:
        """End all offers and pulls."""
        self.handover.close()


def hand_over(owner: Worker, reader: Worker, tokens: int, number: int) -> float:
    """Offer the rows of a prompt, and pull them; return the seconds of the pull."""
    name = token_bytes(32)
    offer = OfferJob(f"p{number}", name, tokens, (owner.blocks,), LEASE)
    owner.handover.begin(Handovers(offers=[offer]))
    endpoint = owner.handover.endpoint
    assert endpoint is not None
    ticket = Ticket.of(*endpoint, name)
    job = PullJob(number, f"d{number}", (ticket,), 0, tokens, (reader.blocks,))
    began = time.perf_counter()
    reader.handover.begin(Handovers(pulls=[job]))
    while not (ended := reader.handover.ended_pulls()):
        if time.perf_counter() > began + LIMIT:
            raise RuntimeError(f"Expected rows in {LIMIT} s.")
        time.sleep(1e-4)
    seconds = time.perf_counter() - began
    reader.handover.begin(Handovers(released=[ticket]))
    if not ended[0][1]:
        raise RuntimeError("Expected rows, got a pull that has failed.")
    return seconds


def measure(device: torch.device, case: Case | None = None, move: Move = hand_over) -> Rows:
    """Return a row for each direction between a device and the host.

    Args:
        case: the prompt; None: the usual one.
        move: hands it over.
    """
    host = torch.device("cpu")
    case = case or Case(4 if device.type == "cpu" else 32)
    return [_measured(*pair, case, move) for pair in ((device, host), (host, device))]


def _measured(source: torch.device, target: torch.device, case: Case, move: Move) -> Row:
    owner = Worker(source, SIZES[0], case, offers=True)
    reader = Worker(target, SIZES[1], case, offers=False)
    taken = list[float]()
    right = True
    drawn = torch.Generator(device="cpu").manual_seed(1)
    shape = (case.layers, 2, case.tokens, HEADS, DIM)
    nbytes = prod(shape) * torch.bfloat16.itemsize
    try:
        for number in range(case.rounds):
            rows = torch.randn(shape, generator=drawn, dtype=torch.float32, device="cpu")
            rows = rows.to(torch.bfloat16)
            owner.write(rows)
            reader.cache.view(torch.uint8).fill_(POISON)
            before = reader.next_tokens()
            taken.append(move(owner, reader, case.tokens, number))
            tokens = reader.next_tokens()
            same = torch.equal(reader.rows.cpu(), rows)
            right &= same and tokens == owner.next_tokens() and tokens != before
    finally:
        owner.close()
        reader.close()
    taken = taken[1:]
    return {
        "kind": "engine_handover_pull",
        "shape": f"{case.tokens} tokens, {source.type} -> {target.type}",
        "tokens": case.tokens,
        "op": f"blocks {SIZES[0]} -> {SIZES[1]}",
        "backend": "staging",
        "payload_bytes": nbytes,
        "p50_ms": short(1e3 * median(taken)),
        "least_ms": short(1e3 * min(taken)),
        "most_ms": short(1e3 * max(taken)),
        "gb_per_s": short(nbytes / median(taken) / 1e9),
        "rounds": len(taken),
        "verified": right,
    }
