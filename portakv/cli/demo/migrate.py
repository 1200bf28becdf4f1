# SPDX-License-Identifier: Apache-2.0
"""`portakv migrate --demo`: rows go from two ranks of one process to three of another one, whose
layout and block size are others, mapped and through staging; every byte is checked.

Three processes: the command itself, which only tells; the owner of the rows; and their reader. Run
as ``python -m portakv.cli.demo.migrate`` this module is each of the latter two.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing, suppress
from json import dumps, loads
from typing import Any

import torch

from portakv import KVView
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.demo.store import heard, started
from portakv.cli.sides import in_bytes, in_time
from portakv.errors import OfferGone, PeerError, PortaKVError
from portakv.runtime.devices import indexed, usual_device

# the last block of either side is not full
LAYERS = 8
HEADS = 6
DIM = 128
TOKENS = 1990
MODEL = "a demo's"
#: Layout, block size, and the heads of each rank: of the owner and of the reader.
OWNER = "vllm-nhd", 16, ((0, 3), (3, 6))
READER = "flexkv-blockfirst", 64, ((0, 2), (2, 4), (4, 6))
WAYS = "mapped", "staging"
PULLS = 2  # by each rank and way: the first one pairs, too, and the last one is timed
LEASE = 300.0  # seconds; the reader's process has to start


def run_migrate_demo(*, device: str | None = None, json: bool = False) -> int:
    """Run the demo, the reader on ``device``, the owner on another one of that type or else on the
    host; 0 if every byte is right and no stale offer was published.

    Raises:
        PeerError: a process of the demo failed; its sentence says why.
    """
    reads = usual_device() if device is None else indexed(device)
    owns = beside(reads)
    with started(__name__, "owner", owns) as owner, started(__name__, "reader", reads) as reader:
        offers = heard(owner, PeerError)
        pipe: Any = reader.stdin  # not arguments, which all users of the host see
        with suppress(BrokenPipeError):  # a reader that has ended is told below
            os.write(pipe.fileno(), f"{dumps(offers)}\n".encode())
        found = heard(reader, PeerError)
    for part, process, where in (("owner", owner, owns), ("reader", reader, reads)):
        found[part] = {"process": process.pid, "device": str(where)}
    if json:
        print_json(found)
    else:
        tell(found)
    return 0 if found["ok"] else 1


def beside(device: torch.device) -> torch.device:
    """Where the owner is: on another device of the same type, or else on the host, since NCCL takes
    no two processes on one device."""
    count = 0 if device.type == "cpu" else torch.accelerator.device_count()
    if count < 2:
        return torch.device("cpu")
    return torch.device(device.type, ((device.index or 0) + 1) % count)


def model_rows(device: torch.device) -> torch.Tensor:
    """As int16 ``[layer, kv, token, head, dim]``: a hash of the place."""
    place = torch.arange(1, 2 * TOKENS * HEADS * DIM + 1, device=device) * 0x1E3779B97F4A7C15 >> 40
    layer = torch.arange(LAYERS, dtype=torch.int16, device=device)[:, None] * 7919
    return (place.to(torch.int16) + layer).view(LAYERS, 2, TOKENS, HEADS, DIM)


def blocks_of(size: int, seed: int) -> torch.Tensor:
    """Blocks for the tokens, in any order; of another seed they are others."""
    count = -(-TOKENS // size)
    mixed = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return mixed + seed * count


def slots_of(blocks: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """The slots of the tokens in blocks."""
    return (blocks[:, None] * size + torch.arange(size, device="cpu")).ravel()[:TOKENS].to(device)


def offer_rows(device: torch.device, keep: ExitStack) -> dict[str, Any]:
    """Offer the model's rows by each way, and others that no offer holds any more; the tickets."""
    from portakv.migrate import Channel, Owner, Shard, shared_empty

    layout, size, ranks = OWNER
    good = blocks_of(size, 0)
    stale = blocks_of(size, 1)
    found: dict[str, Any] = {way: {"good": [], "stale": []} for way in WAYS}
    caches = list[torch.Tensor]()
    rows = model_rows(device)
    for heads in ranks:
        shape = 2, 2 * len(good), size, heads[1] - heads[0], DIM
        for layer in range(LAYERS):
            made = torch.empty(shape, dtype=torch.float16, device=device)
            caches.append(shared_empty(shape, made.dtype) if device.type == "cpu" else made)
            bits = caches[-1].view(torch.int16).flatten(1, 2)
            for blocks in (good, stale):
                bits[:, slots_of(blocks, size, device)] = rows[layer, :, :, slice(*heads)]
        shard = Shard(KVView(caches[-LAYERS:], layout), heads=(*heads, HEADS))
        for way in WAYS:
            expose: Any = way
            channel = keep.enter_context(closing(Channel()))
            owner = keep.enter_context(closing(Owner(channel, shard, model=MODEL, expose=expose)))
            terms: Any = {"tokens": TOKENS, "lease": LEASE, "readers": len(READER[2]) * PULLS}
            found[way]["good"].append(owner.offer(good, **terms).ticket.hex())
            gone = owner.offer(stale, **terms)
            found[way]["stale"].append(gone.ticket.hex())
            gone.revoke()
    for cache in caches:  # what was offered and is not any more has other rows at once
        cache.view(torch.int16)[:, len(good) :] = -1
    return found


def pull_rows(device: torch.device, offers: dict[str, Any], keep: ExitStack) -> dict[str, Any]:
    """Pull what is offered into each rank, by each way, and what is not; what came of it, and
    whether each rank has its bytes by each way, and stale rows were published by none."""
    from portakv.migrate import Channel, Reader, Shard

    layout, size, ranks = READER
    blocks = blocks_of(size, 0)
    pulls = list[dict[str, Any]]()
    for rank, heads in enumerate(ranks):
        shape = len(blocks) + 1, LAYERS, 2, size, heads[1] - heads[0], DIM  # one block not asked
        pages = torch.empty(shape, dtype=torch.float16, device=device)
        shard = Shard(KVView(pages, layout), heads=(*heads, HEADS))
        channel = keep.enter_context(closing(Channel()))  # as each rank's process has its own
        reader = keep.enter_context(closing(Reader(channel, shard, model=MODEL)))
        sources = [n for n, (a, b) in enumerate(OWNER[2]) if a < heads[1] and heads[0] < b]
        expected = _expected(pages, blocks, heads)
        for way in WAYS:
            for what in ("good", "stale") if rank == 0 else ("good",):
                tickets = [bytes.fromhex(offers[way][what][n]) for n in sources]
                each = list[dict[str, Any]]()
                stale = what == "stale"
                for _ in range(1 if stale else PULLS):
                    each.append(_pulled(reader, tickets, blocks, pages, expected))
                told = {"rank": rank, "heads": heads, "from": sources, "way": way, "stale": stale}
                wrong = sum(one["wrong_bytes"] for one in each)
                pulls.append(told | each[-1] | {"wrong_bytes": wrong})
    ok = all(not (one["published"] if one["stale"] else one["wrong_bytes"]) for one in pulls)
    return {"pulls": pulls, "ok": ok}


def _expected(pages: torch.Tensor, blocks: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """What pages full of ones hold once the rows are in their blocks, by plain torch indexing."""
    bits = torch.full_like(pages, 1).view(torch.int16)
    size = READER[1]
    at = slots_of(blocks, size, pages.device)
    rows = model_rows(pages.device)[..., slice(*heads), :]
    bits[at // size, :, :, at % size] = rows.permute(2, 0, 1, 3, 4)
    return bits


def _pulled(
    reader: Any, tickets: list[bytes], blocks: Any, pages: torch.Tensor, expected: torch.Tensor
) -> dict[str, Any]:
    """One pull, and what is in the pages then."""
    pages.fill_(1)
    began = time.perf_counter()
    why = ""
    pull = reader.pull(tickets, blocks)
    try:
        pull.synchronize(60)
    except OfferGone as error:
        why = str(error)
    seconds = time.perf_counter() - began
    by = pull.statistics
    wrong = int((pages.view(torch.uint8) != expected.view(torch.uint8)).sum())
    told = {"seconds": seconds, "wrong_bytes": wrong, "why": why or by.why}
    return told | {"engine": by.engine, "bytes": by.nbytes, "published": pull.published}


def tell(found: dict[str, Any]) -> None:
    """Print what came of it."""
    owner = found["owner"]
    reader = found["reader"]
    for what, one, side in (("owned", owner, OWNER), ("read", reader, READER)):
        layout, size, ranks = side
        where = f"process {one['process']} on {one['device']}"
        print(f"{what:8}by {where}: {len(ranks)} ranks, {layout}, {size} tokens a block")
    shape = f"{LAYERS} layers, keys and values, {HEADS} heads of {DIM} fp16 numbers"
    print(f"rows    {TOKENS:,} tokens of {shape}\n")
    numbers = "bytes", "time", "GB/s"
    names = "rank", "heads", "from ranks", "way", *numbers, "what is there"
    columns = [Column(name, whole=True, right=name in numbers) for name in names]
    print_table(columns, [_cells(one) for one in found["pulls"] if not one["stale"]])
    print()
    for way, why in {one["engine"]: one["why"] for one in found["pulls"] if one["engine"]}.items():
        print_prose(f"{way}: {why}.")
    for one in found["pulls"]:
        if one["stale"]:
            result = "PUBLISHED" if one["published"] else "not published"
            print_prose(f"A stale offer, {one['way']}: {result}. {one['why']}")
    right = "all right, and no other byte of the readers' pages has changed"
    print_prose(f"bytes: {right if found['ok'] else 'WRONG or missing, or stale ones published'}.")


def _cells(one: dict[str, Any]) -> list[str]:
    first, past = one["heads"]
    rate = f"{one['bytes'] / one['seconds'] / 1e9:.2f}"
    wrong = one["wrong_bytes"]
    numbers = (in_bytes(one["bytes"]), in_time(one["seconds"]), rate)
    what = f"{wrong:,} B wrong" if wrong else "all bytes right"
    froms = ", ".join(map(str, one["from"]))
    return [str(one["rank"]), f"{first}-{past - 1}", froms, one["engine"], *numbers, what]


def _take_part(part: str, device: str) -> None:
    """Be the owner, or the reader of what the first line of standard input tells."""
    with ExitStack() as keep:
        try:
            where = torch.device(device)
            if part == "owner":
                found = offer_rows(where, keep)
            else:
                found = pull_rows(where, loads(sys.stdin.readline()), keep)
        except (ImportError, PortaKVError) as error:
            found = {"error": str(error).rstrip(".")}
        print(dumps(found), flush=True)
        sys.stdin.read()  # until the command ends


if __name__ == "__main__":
    _take_part(*sys.argv[1:])
