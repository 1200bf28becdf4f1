# SPDX-License-Identifier: Apache-2.0
"""Three ranks of one process pull a model's rows from two ranks of another process.

    python examples/migrate_rows.py [device]     # extra migrate

The ranks hold different heads, and their pages have another layout and another block size. The
rows are pulled twice: from the owner's mapped memory, and through staging buffers. Plain torch
indexing gives the expected bytes, and every byte of the pages is compared. Offers that the owner
has revoked, because its pages have other rows by then, must not be published.

With two accelerators the owner is on another one than the reader, else on the host: NCCL does not
accept two processes on one device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from portakv import KVView
from portakv.errors import OfferGone, PortaKVError
from portakv.migrate import Channel, Owner, Reader, Shard, shared_empty

LAYERS = 8
HEADS = 6
DIM = 128
TOKENS = 1990  # the last block of either side is not full
MODEL = "a small model"
LEASE = 300.0  # seconds; the reader has to connect meanwhile
Method: TypeAlias = Literal["mapped", "staging"]
METHODS: tuple[Method, ...] = ("mapped", "staging")
PULLS = 2  # by each rank and method: the first one also connects, the last one is timed
#: For each method the tickets of offers that hold, and of offers that were revoked, by rank.
Offers: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]


class Side(NamedTuple):
    """The pages of the owner or of the reader."""

    layout: str
    block_size: int
    ranks: tuple[tuple[int, int], ...]  # the heads of each rank


OWNER = Side("vllm-nhd", 16, ((0, 3), (3, 6)))
READER = Side("flexkv-blockfirst", 64, ((0, 2), (2, 4), (4, 6)))


@dataclass(frozen=True)
class Pulled:
    """The result of a pull.

    Attributes:
        strategy: that moved the rows; ``why`` is its reason, or that of the error.
        wrong: bytes of the reader's pages that are not the expected ones.
    """

    rank: int
    sources: list[int]
    method: Method
    stale: bool
    published: bool
    strategy: str
    why: str
    nbytes: int
    wrong: int
    seconds: float

    @property
    def good(self) -> bool:
        """Return True for right bytes, or for a revoked offer that was not published."""
        return not self.published if self.stale else not self.wrong


def model_rows(device: torch.device) -> torch.Tensor:
    """Return int16 rows ``[layer, kv, token, head, dim]``: a hash of the position."""
    place = torch.arange(1, 2 * TOKENS * HEADS * DIM + 1, device=device) * 0x1E3779B97F4A7C15 >> 40
    layer = torch.arange(LAYERS, dtype=torch.int16, device=device)[:, None] * 7919
    return (place.to(torch.int16) + layer).view(LAYERS, 2, TOKENS, HEADS, DIM)


def blocks_of(size: int, seed: int) -> torch.Tensor:
    """Return shuffled ids of blocks for the tokens; another seed gives other blocks."""
    count = -(-TOKENS // size)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)) + seed * count


def slots_of(blocks: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """Return the slots of the tokens in these blocks."""
    return (blocks[:, None] * size + torch.arange(size)).ravel()[:TOKENS].to(device)


def offer_rows(device: torch.device, keep: ExitStack) -> Offers:
    """Offer the rows of each rank by each method, revoke a second offer, and return the tickets.

    The channels and owners stay open until ``keep`` closes them.
    """
    size = OWNER.block_size
    good = blocks_of(size, 0)
    stale = blocks_of(size, 1)
    offers = {str(method): {"good": list[str](), "stale": list[str]()} for method in METHODS}
    rows = model_rows(device)
    caches = list[torch.Tensor]()
    for first, past in OWNER.ranks:
        shape = 2, 2 * len(good), size, past - first, DIM
        # A peer maps device memory as it is, and host memory of `shared_empty`.
        made = [
            shared_empty(shape, torch.float16)
            if device.type == "cpu"
            else torch.empty(shape, dtype=torch.float16, device=device)
            for _ in range(LAYERS)
        ]
        for layer, cache in enumerate(made):
            bits = cache.view(torch.int16).flatten(1, 2)
            for blocks in (good, stale):
                bits[:, slots_of(blocks, size, device)] = rows[layer, :, :, first:past]
        shard = Shard(KVView(made, OWNER.layout), heads=(first, past, HEADS))
        for method in METHODS:
            channel = keep.enter_context(closing(Channel()))
            owner = keep.enter_context(closing(Owner(channel, shard, model=MODEL, expose=method)))
            readers = len(READER.ranks) * PULLS
            holds = owner.offer(good, tokens=TOKENS, lease=LEASE, readers=readers)
            offers[method]["good"].append(holds.ticket.hex())
            revoked = owner.offer(stale, tokens=TOKENS, lease=LEASE, readers=readers)
            offers[method]["stale"].append(revoked.ticket.hex())
            revoked.revoke()
        caches += made

    # Other rows come into the pages of the revoked offers.
    for cache in caches:
        cache.view(torch.int16)[:, len(good) :] = -1
    return offers


class Rank:
    """A rank of the reader: its pages, the bytes that they must have, and its `Reader`."""

    def __init__(self, rank: int, device: torch.device, keep: ExitStack) -> None:
        self.rank = rank
        first, past = READER.ranks[rank]
        self.sources = [n for n, (a, b) in enumerate(OWNER.ranks) if a < past and first < b]
        size = READER.block_size
        self.blocks = blocks_of(size, 0)
        # The pages have one block that the pull does not write.
        shape = len(self.blocks) + 1, LAYERS, 2, size, past - first, DIM
        self.pages = torch.empty(shape, dtype=torch.float16, device=device)
        self.expected = torch.full_like(self.pages, 1)
        slots = slots_of(self.blocks, size, device)
        rows = model_rows(device)[..., first:past, :].permute(2, 0, 1, 3, 4)
        self.expected.view(torch.int16)[slots // size, :, :, slots % size] = rows

        # Each rank has a separate channel, as a rank in a separate process has.
        channel = keep.enter_context(closing(Channel()))
        shard = Shard(KVView(self.pages, READER.layout), heads=(first, past, HEADS))
        self.reader = keep.enter_context(closing(Reader(channel, shard, model=MODEL)))

    def pull(self, offers: Offers, method: Method, stale: bool) -> Pulled:
        """Pull the rows once, and compare the pages."""
        texts = offers[method]["stale" if stale else "good"]
        tickets = [bytes.fromhex(texts[n]) for n in self.sources]
        self.pages.fill_(1)
        why = ""
        began = time.perf_counter()
        pull = self.reader.pull(tickets, self.blocks)
        try:
            pull.synchronize(60)
        except OfferGone as error:
            why = str(error)
        seconds = time.perf_counter() - began
        wrong = self.pages.view(torch.uint8) != self.expected.view(torch.uint8)
        return Pulled(
            rank=self.rank,
            sources=self.sources,
            method=method,
            stale=stale,
            published=pull.published,
            strategy=pull.statistics.strategy,
            why=why or pull.statistics.why,
            nbytes=pull.statistics.nbytes,
            wrong=int(wrong.sum()),
            seconds=seconds,
        )


def pull_rows(device: torch.device, offers: Offers, keep: ExitStack) -> list[Pulled]:
    """Pull the rows into each rank by each method, and the revoked offers into rank 0."""
    pulls = list[Pulled]()
    for number in range(len(READER.ranks)):
        rank = Rank(number, device, keep)
        for method in METHODS:
            pulls += [rank.pull(offers, method, stale=False) for _ in range(PULLS)]
            if number == 0:
                pulls.append(rank.pull(offers, method, stale=True))
    return pulls


def show(pulls: Sequence[Pulled], tell: Callable[[str], None]) -> bool:
    """Report the pulls; return True if all are good."""
    timed = {(pull.rank, pull.method): pull for pull in pulls if not pull.stale}
    for pull in timed.values():
        first, past = READER.ranks[pull.rank]
        ranks = ", ".join(map(str, pull.sources))
        rate = f"{pull.nbytes / 2**20:.1f} MiB in {pull.seconds * 1e3:.1f} ms"
        source = f"heads {first}-{past - 1} of ranks {ranks}"
        tell(f"rank {pull.rank}    {source}, {pull.strategy}: {rate}, {pull.wrong} bytes wrong")
    for strategy, why in {pull.strategy: pull.why for pull in timed.values()}.items():
        tell(f"why       {strategy}: {why}")
    for pull in pulls:
        if pull.stale:
            outcome = "PUBLISHED" if pull.published else "not published"
            tell(f"revoked   {pull.method}: {outcome}. {pull.why}")
    good = all(pull.good for pull in pulls)
    right = "all right, and no other byte of the reader's pages has changed"
    tell(f"bytes     {right if good else 'WRONG or missing, or revoked rows were published'}")
    return good


def owner_device(device: torch.device) -> torch.device:
    """Return another device of the same type for the owner, or else the host."""
    count = 0 if device.type == "cpu" else torch.accelerator.device_count()
    if count < 2:
        return torch.device("cpu")
    return torch.device(device.type, ((device.index or 0) + 1) % count)


def main(device: str = "cpu", tell: Callable[[str], None] = print) -> bool:
    """Pull the rows of another process; return True if every byte is right."""
    reads = torch.device(device)
    owns = owner_device(reads)
    command = [sys.executable, __file__, str(owns), "--own"]
    pipe = subprocess.PIPE
    with ExitStack() as keep:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        owner = keep.enter_context(process)
        try:
            assert owner.stdout is not None
            offers = json.loads(next((x for x in owner.stdout if x.startswith("{")), "{}"))
            if not offers:
                tell("the owner's process has ended; its standard error shows why")
                return False
            for name, side, where in (("owner", OWNER, owns), ("reader", READER, reads)):
                pages = f"{side.layout}, {side.block_size} tokens a block"
                tell(f"{name:9} {len(side.ranks)} ranks on {where}: {pages}")
            shape = f"{LAYERS} layers, keys and values, {HEADS} heads of {DIM} fp16 numbers"
            tell(f"rows      {TOKENS:,} tokens of {shape}")
            return show(pull_rows(reads, offers, keep), tell)
        finally:
            owner.kill()


def own(device: str) -> None:
    """Run the owner's process: offer the rows, until it is killed."""
    with ExitStack() as keep:
        print(json.dumps(offer_rows(torch.device(device), keep)), flush=True)
        sys.stdin.read()


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if every byte is right and no revoked row was published."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--own", action="store_true", help="be the owner's process")
    args = parser.parse_args(words)
    try:
        if args.own:
            own(args.device)
            return 0
        return 0 if main(args.device) else 1
    except PortaKVError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
