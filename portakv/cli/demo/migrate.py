# SPDX-License-Identifier: Apache-2.0
"""`portakv migrate --demo`: pull rows from two ranks of one process into three ranks of another.

The reader's layout and block size differ from the owner's. The rows are pulled from mapped memory
and through staging, and every byte is checked.

The demo has three processes: the command itself, which prints; the owner of the rows; and their
reader. ``python -m portakv.cli.demo.migrate`` runs this module as the owner or the reader.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing, suppress
from json import dumps, loads
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from portakv import KVView
from portakv.cli.console import Column, Report, print_json, print_prose, print_table
from portakv.cli.demo.store import read_answer, started
from portakv.cli.sides import in_bytes, in_time
from portakv.errors import OfferGone, PeerError, PortaKVError
from portakv.runtime.devices import indexed, usual_device

if TYPE_CHECKING:
    from portakv.migrate import Reader

# The last block of either side is not full.
LAYERS = 8
HEADS = 6
DIM = 128
TOKENS = 1990
MODEL = "a demo's"


class Side(NamedTuple):
    """The pages of the owner or the reader."""

    layout: str
    block_size: int
    ranks: tuple[tuple[int, int], ...]  # the heads of each rank


OWNER = Side("vllm-nhd", 16, ((0, 3), (3, 6)))
READER = Side("flexkv-blockfirst", 64, ((0, 2), (2, 4), (4, 6)))
METHODS: tuple[Literal["mapped", "staging"], ...] = ("mapped", "staging")
PULLS = 2  # by each rank and method: the first pull also connects, the last pull is timed
LEASE = 300.0  # seconds; the reader's process has to start


def run_migrate_demo(*, device: str | None = None, json: bool = False) -> int:
    """Run the demo with the reader on ``device``; `owner_device` chooses the owner's device.

    Return 0 if every byte is right and no rank published rows of a stale offer.

    Raises:
        PeerError: a process of the demo failed; the message is that of the process.
    """
    reads = usual_device() if device is None else indexed(device)
    owns = owner_device(reads)
    with started(__name__, "owner", owns) as owner, started(__name__, "reader", reads) as reader:
        offers = read_answer(owner, PeerError)
        # A pipe, because all users of the host can see the arguments of a process.
        pipe = reader.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # `read_answer` reports a reader that has ended
            os.write(pipe.fileno(), f"{dumps(offers)}\n".encode())
        report = read_answer(reader, PeerError)
    for part, process, where in (("owner", owner, owns), ("reader", reader, reads)):
        report[part] = {"process": process.pid, "device": str(where)}
    if json:
        print_json(report)
    else:
        print_report(report)
    return 0 if report["ok"] else 1


def owner_device(device: torch.device) -> torch.device:
    """Return another device of the same type for the owner, or else the host.

    NCCL does not accept two processes on one device.
    """
    count = 0 if device.type == "cpu" else torch.accelerator.device_count()
    if count < 2:
        return torch.device("cpu")
    return torch.device(device.type, ((device.index or 0) + 1) % count)


def model_rows(device: torch.device) -> torch.Tensor:
    """Return int16 rows ``[layer, kv, token, head, dim]``: a hash of the position."""
    place = torch.arange(1, 2 * TOKENS * HEADS * DIM + 1, device=device) * 0x1E3779B97F4A7C15 >> 40
    layer = torch.arange(LAYERS, dtype=torch.int16, device=device)[:, None] * 7919
    return (place.to(torch.int16) + layer).view(LAYERS, 2, TOKENS, HEADS, DIM)


def blocks_of(size: int, seed: int) -> torch.Tensor:
    """Return shuffled block ids for the tokens; another seed returns other blocks."""
    count = -(-TOKENS // size)
    mixed = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return mixed + seed * count


def slots_of(blocks: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """Return the slots of the tokens in blocks."""
    return (blocks[:, None] * size + torch.arange(size, device="cpu")).ravel()[:TOKENS].to(device)


def offer_rows(device: torch.device, keep: ExitStack) -> Report:
    """Offer the model's rows by each method, revoke offers of stale rows, return the tickets."""
    from portakv.migrate import Channel, Owner, Shard, shared_empty

    size = OWNER.block_size
    good = blocks_of(size, 0)
    stale = blocks_of(size, 1)
    report: Report = {method: {"good": [], "stale": []} for method in METHODS}
    caches = list[torch.Tensor]()
    rows = model_rows(device)
    for heads in OWNER.ranks:
        shape = 2, 2 * len(good), size, heads[1] - heads[0], DIM
        for layer in range(LAYERS):
            made = torch.empty(shape, dtype=torch.float16, device=device)
            caches.append(shared_empty(shape, made.dtype) if device.type == "cpu" else made)
            bits = caches[-1].view(torch.int16).flatten(1, 2)
            for blocks in (good, stale):
                bits[:, slots_of(blocks, size, device)] = rows[layer, :, :, slice(*heads)]
        shard = Shard(KVView(caches[-LAYERS:], OWNER.layout), heads=(*heads, HEADS))
        for method in METHODS:
            channel = keep.enter_context(closing(Channel()))
            owner = keep.enter_context(closing(Owner(channel, shard, model=MODEL, expose=method)))
            readers = len(READER.ranks) * PULLS
            offer = owner.offer(good, tokens=TOKENS, lease=LEASE, readers=readers)
            report[method]["good"].append(offer.ticket.hex())
            revoked = owner.offer(stale, tokens=TOKENS, lease=LEASE, readers=readers)
            report[method]["stale"].append(revoked.ticket.hex())
            revoked.revoke()

    # Overwrite the rows of the revoked offers immediately.
    for cache in caches:
        cache.view(torch.int16)[:, len(good) :] = -1
    return report


def pull_rows(device: torch.device, offers: Report, keep: ExitStack) -> Report:
    """Pull the offers into each rank by each method, and the stale offers into rank 0.

    Return a report of each pull. ``ok`` is true if each rank has its bytes by each method and no
    rank published stale rows.
    """
    from portakv.migrate import Channel, Reader, Shard

    size = READER.block_size
    blocks = blocks_of(size, 0)
    pulls = list[Report]()
    for rank, heads in enumerate(READER.ranks):
        # One block more than the pull requests.
        shape = len(blocks) + 1, LAYERS, 2, size, heads[1] - heads[0], DIM
        pages = torch.empty(shape, dtype=torch.float16, device=device)
        shard = Shard(KVView(pages, READER.layout), heads=(*heads, HEADS))
        # Each rank has a separate channel, as a rank in a separate process has.
        channel = keep.enter_context(closing(Channel()))
        reader = keep.enter_context(closing(Reader(channel, shard, model=MODEL)))
        sources = [n for n, (a, b) in enumerate(OWNER.ranks) if a < heads[1] and heads[0] < b]
        expected = _expected(pages, blocks, heads)
        for method in METHODS:
            for what in ("good", "stale") if rank == 0 else ("good",):
                tickets = [bytes.fromhex(offers[method][what][n]) for n in sources]
                stale = what == "stale"
                each = [
                    _pulled(reader, tickets, blocks, pages, expected)
                    for _ in range(1 if stale else PULLS)
                ]
                report = {
                    "rank": rank,
                    "heads": heads,
                    "from": sources,
                    "way": method,
                    "stale": stale,
                }
                wrong = sum(one["wrong_bytes"] for one in each)
                pulls.append(report | each[-1] | {"wrong_bytes": wrong})
    ok = all(not (one["published"] if one["stale"] else one["wrong_bytes"]) for one in pulls)
    return {"pulls": pulls, "ok": ok}


def _expected(pages: torch.Tensor, blocks: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Return the expected pages: ones, except for the rows, by plain torch indexing."""
    bits = torch.full_like(pages, 1).view(torch.int16)
    size = READER.block_size
    slots = slots_of(blocks, size, pages.device)
    rows = model_rows(pages.device)[..., slice(*heads), :]
    bits[slots // size, :, :, slots % size] = rows.permute(2, 0, 1, 3, 4)
    return bits


def _pulled(
    reader: Reader,
    tickets: list[bytes],
    blocks: torch.Tensor,
    pages: torch.Tensor,
    expected: torch.Tensor,
) -> Report:
    """Pull once; return the report of the pull, with the number of wrong bytes."""
    pages.fill_(1)
    began = time.perf_counter()
    why = ""
    pull = reader.pull(tickets, blocks)
    try:
        pull.synchronize(60)
    except OfferGone as error:
        why = str(error)
    seconds = time.perf_counter() - began
    statistics = pull.statistics
    wrong = int((pages.view(torch.uint8) != expected.view(torch.uint8)).sum())
    report = {"seconds": seconds, "wrong_bytes": wrong, "why": why or statistics.why}
    return report | {
        "engine": statistics.strategy,
        "bytes": statistics.nbytes,
        "published": pull.published,
    }


def print_report(report: Report) -> None:
    """Print the report of the demo."""
    owner = report["owner"]
    reader = report["reader"]
    for what, one, side in (("owned", owner, OWNER), ("read", reader, READER)):
        where = f"process {one['process']} on {one['device']}"
        pages = f"{len(side.ranks)} ranks, {side.layout}, {side.block_size} tokens a block"
        print(f"{what:8}by {where}: {pages}")
    shape = f"{LAYERS} layers, keys and values, {HEADS} heads of {DIM} fp16 numbers"
    print(f"rows    {TOKENS:,} tokens of {shape}\n")
    numbers = "bytes", "time", "GB/s"
    names = "rank", "heads", "from ranks", "method", *numbers, "result"
    columns = [Column(name, whole=True, right=name in numbers) for name in names]
    print_table(columns, [_cells(one) for one in report["pulls"] if not one["stale"]])
    print()
    reasons = {one["engine"]: one["why"] for one in report["pulls"] if one["engine"]}
    for engine, why in reasons.items():
        print_prose(f"{engine}: {why}.")
    for one in report["pulls"]:
        if one["stale"]:
            outcome = "PUBLISHED" if one["published"] else "not published"
            print_prose(f"A stale offer, {one['way']}: {outcome}. {one['why']}")
    right = "all right, and no other byte of the readers' pages has changed"
    print_prose(f"bytes: {right if report['ok'] else 'WRONG or missing, or stale ones published'}.")


def _cells(one: Report) -> list[str]:
    first, past = one["heads"]
    rate = f"{one['bytes'] / one['seconds'] / 1e9:.2f}"
    wrong = one["wrong_bytes"]
    numbers = (in_bytes(one["bytes"]), in_time(one["seconds"]), rate)
    result = f"{wrong:,} B wrong" if wrong else "all bytes right"
    ranks = ", ".join(map(str, one["from"]))
    return [str(one["rank"]), f"{first}-{past - 1}", ranks, one["engine"], *numbers, result]


def _take_part(part: str, device: str) -> None:
    """Run as the owner, or as the reader of the tickets on the first line of standard input."""
    with ExitStack() as keep:
        try:
            where = torch.device(device)
            if part == "owner":
                report = offer_rows(where, keep)
            else:
                report = pull_rows(where, loads(sys.stdin.readline()), keep)
        except (ImportError, PortaKVError) as error:
            report = {"error": str(error).rstrip(".")}
        print(dumps(report), flush=True)
        sys.stdin.read()  # until the command ends


if __name__ == "__main__":
    _take_part(*sys.argv[1:])
