# SPDX-License-Identifier: Apache-2.0
"""The engines that read and write a disk, alongside fio; tiers as a block store drives them, with
checksums and index: a disk's alongside its engine alone and LMCache's `fs_native` in one folder, a
remote one alongside plain requests for the same bytes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import count
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch

from portakv import KVView, Unsupported
from portakv.storage import image
from portakv.storage.calls import LOADED, SAVED
from portakv.storage.form import BlockForm
from portakv.storage.io.choose import choose
from portakv.storage.memory import Rows as Memory
from portakv.storage.tiers.disk import Disk
from portakv.storage.tiers.remote import Remote
from portakv.storage.work import Graph, Queue
from portakv.tasks import Handle
from portakv_benchmarks.host.suite import MB
from portakv_benchmarks.shared.files import FIO, FsNative, Slab, close
from portakv_benchmarks.shared.harness import Row, Rows, Step, having, short
from portakv_benchmarks.shared.shapes import POISON, in_words
from portakv_benchmarks.shared.trials import Method, Sample, timed
from portakv_benchmarks.storage.suite import StorageBench

LAYERS = 32
HEADS = 8
DIM = 64
CHUNKS = {"store": SAVED, "load": LOADED}  # as a store's tasks
REQUESTS = 8  # of a remote store, at the same time


def caches(blocks: int, nbytes: int, device: torch.device, layers: int = LAYERS) -> KVView:
    """Return a paged bfloat16 cache of random bits, with blocks of so many bytes in all layers."""
    tokens = max(1, nbytes // (layers * HEADS * DIM * 4))
    shape = (2, blocks, tokens, HEADS, DIM)
    made = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(layers)]
    for tensor in words(made):
        tensor.random_()
    return KVView(made, "layer | kv block token head dim", block_size=tokens)


def words(tensors: Any) -> list[torch.Tensor]:
    """Return tensors of a cache as bits that can be compared."""
    return [tensor.view(torch.int16) for tensor in tensors]


class Tier:
    """The store of a disk or remote tier, with blocks to write in its memory and rows to read them
    into after these."""

    def __init__(self, nbytes: int, amount: int, kind: Disk | Remote, chunk: int = 0) -> None:
        self.form = BlockForm.of(caches(1, nbytes, torch.device("cpu")), "bench")
        self.amount = amount
        size = self.form.image_bytes
        self.chunks = {op: chunk or max(1, n // size) for op, n in CHUNKS.items()}
        self.memory = Memory([size], 2 * amount * size, 0)
        self.payload = self.memory.tensor[:, image.HEADER :][:, : self.form.payload_bytes]
        self.payload.random_()
        self.first = {"store": 0, "load": amount}
        self.numbers = count(1)
        self.keys = list[bytes]()
        self.graph = Graph()
        self.tier_store: Any = kind.open(self.graph, self.memory, [self.form])[0]

    def close(self) -> None:
        close(self.graph, self.tier_store)

    def run(self, op: str) -> Sample:
        """Store new blocks, or load them, in tasks as a store makes them."""
        if op == "store":
            start = next(self.numbers) * self.amount
            self.keys = [(start + n).to_bytes(32, "big") for n in range(self.amount)]
        return timed(partial(self._run, op))

    def _run(self, op: str) -> None:
        ends = list[Handle[Any]]()
        tier_store = self.tier_store
        first = self.first[op]
        for at in range(0, self.amount, self.chunks[op]):
            keys = self.keys[at : at + self.chunks[op]]
            rows = [self.memory.array[first + at + n] for n in range(len(keys))]
            queue = tier_store.queue_for_write(len(keys) * self.form.image_bytes)
            if op == "load":
                queue = tier_store.queue(keys[0])
            call = queue.call(op, self._move, op, queue, keys, rows)
            ends.append(self.graph.runtime.start(call))
        for end in ends:
            if not end.synchronize().all():
                raise RuntimeError(f"{op}: blocks did not land")

    def _move(self, op: str, queue: Queue, keys: list[bytes], rows: Any) -> Any:
        if op == "load":
            return np.array(self.tier_store.read(keys, rows))
        numbers = [next(self.numbers) for _ in keys]
        triples = zip(rows, keys, numbers, strict=True)
        sums = [image.seal(row, self.form, key, number) for row, key, number in triples]
        return np.array(self.tier_store.write(queue, keys, rows, numbers, sums))

    def method(self, op: str) -> Method:
        """Return storing or loading as a method; stored blocks are loaded to be judged."""
        return Method("tier", partial(self.run, op), right=self.right)

    def right(self) -> bool:
        """Return whether the disk holds the bytes that were stored."""
        stored, loaded = self.payload.split(self.amount)
        loaded.fill_(POISON)
        self.run("load")
        return torch.equal(stored, loaded)


def engine_steps(bench: StorageBench) -> Iterator[Step]:
    """Measure each size, read and written, by each I/O engine; `threads` at one size alone."""
    for size in bench.sizes.sizes:
        yield in_words(size), partial(_both_directions, bench, size)


def _both_directions(bench: StorageBench, size: int) -> Rows:
    slab = Slab(bench.trials, bench.folder, size, bench.sizes.slots_of(size))
    rows = Rows()
    engine, decisions = choose(slab.places)
    engines = [engine]
    prefix = f"engine, {in_words(size)}: "
    bench.left_out += [prefix + str(one) for one in decisions if not one.accepted]
    if engine.name != "threads" and size == bench.sizes.usual:
        engines.append(choose(slab.places, "threads")[0])
    for op in ("read", "write"):
        methods = [slab.method(one, op) for one in engines]
        methods += [slab.fio(bench.fio, name, op) for name in FIO if bench.fio]
        what = {"kind": "storage_engine", "shape": in_words(size), "slot_bytes": size, "op": op}
        results = bench.trials.rows(what, slab.nbytes, methods, {"of_fio": "fio"})
        rows += [{**row, "chosen": row["backend"] == engine.name} for row in results]
    bench.left_out += [prefix + note for note in engine.notes]
    close(slab, *engines)
    return rows


def tier_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield a step for each size of blocks: stores into an empty and a full tier, and loads."""
    for size in bench.sizes.tiered:
        yield in_words(size), partial(_tier, bench, size)


def _tier(bench: StorageBench, size: int) -> Rows:
    amount = bench.sizes.slots_of(size)
    rounds = bench.sizes.rounds
    nbytes = amount * size
    capacity = amount * (size + image.HEADER)
    # In one of them each store comes into slots that were never written.
    folder = bench.folder / f"tier {size}"
    fresh = Tier(size, amount, Disk(folder / "fresh", capacity=(rounds + 2) * capacity))
    tier = Tier(size, amount, Disk(folder / "tier", capacity=capacity))
    slab = Slab(bench.trials, bench.folder, tier.form.image_bytes, amount)
    engine, _ = choose(slab.places)
    peers = [FsNative(x, bench.folder, size, amount) for x in [bench.lmcache] if x]
    fields = {"kind": "storage_tier", "shape": in_words(size)}
    compared_with = {"of_engine": "engine", "of_lmcache": "lmcache"}
    methods = [fresh.method("store")]
    methods += [peer.method("store", partial(peer.ask, "clear")) for peer in peers]
    rows = bench.trials.rows({**fields, "op": "first store"}, nbytes, methods, compared_with)
    for op, word, plain in (("full store", "replace", "write"), ("load", "load", "read")):
        methods = [tier.method(op.split()[-1]), slab.method(engine, plain, "engine")]
        methods += [peer.method(word) for peer in peers]
        rows += bench.trials.rows({**fields, "op": op}, nbytes, methods, compared_with)
    close(fresh, tier, slab, engine, *peers)
    shutil.rmtree(folder)  # the next size may need the space
    compare_processor_time(rows)
    return rows


def compare_processor_time(rows: Rows) -> None:
    """Add the processor time of the tier's rows beyond that of the engine, and relative to
    LMCache's, in the same operation."""
    for row in having(rows, backend="tier"):
        times = {x["backend"]: x["cpu_us_per_mib"] for x in having(rows, op=row["op"])}
        own = times["tier"]
        if "engine" in times:
            row["cpu_over_engine_us"] = short(own - times["engine"])
        if "lmcache" in times:
            row["cpu_of_lmcache"] = short(own / times["lmcache"])


def remote_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield a step for objects of 1 MB, by eight concurrent requests."""
    yield "1 MB", partial(_remote, bench)


def _remote(bench: StorageBench) -> Rows:
    import obstore

    if find_spec("moto") is None:
        raise Unsupported("A bucket to measure", "moto is not installed; pip install moto[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(100):
            with suppress(OSError):
                urlopen(Request(f"{address}/bench", method="PUT"), timeout=5).close()
                break
            time.sleep(0.2)
        arguments: Row = {"endpoint": address, "client_options": {"allow_http": True}}
        arguments |= {"access_key_id": "bench", "secret_access_key": "bench", "region": "us-east-1"}
        remote = Remote("s3://bench/kv", workers=REQUESTS, **arguments)
        tier = Tier(MB, bench.sizes.remote, remote, chunk=1)
        sizes = list[int]()
        tier.run("store")
        listed = [one for batch in obstore.list(remote.store) for one in batch]
        paths = [one["path"] for one in listed if one["size"] == tier.form.image_bytes]

        def get(path: str) -> None:
            sizes.append(len(obstore.get(remote.store, path).bytes()))

        with ThreadPoolExecutor(REQUESTS) as pool:
            raw = Method(
                "obs.get",
                lambda: timed(lambda: list(pool.map(get, paths))),
                sizes.clear,
                lambda: sizes == [tier.form.image_bytes] * len(paths),
            )
            fields = {"kind": "storage_remote", "shape": "1 MB, moto", "op": "load"}
            methods = [tier.method("load"), raw]
            nbytes = len(paths) * MB
            rows = bench.trials.rows(fields, nbytes, methods, {"of_raw": "obs.get"})
        tier.close()
    finally:
        server.terminate()
        server.wait(30)
    return rows
