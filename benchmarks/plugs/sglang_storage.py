# SPDX-License-Identifier: Apache-2.0
"""SGLang's storage backends of HiCache: its own ``file``, and PortaKV's, in turns.

    python -m portakv_benchmarks.plugs.sglang_storage FOLDER [--pages 256] [--rounds 5]
        [--faults 200] [--json FILE]

Pages of a host pool are stored and loaded in batches of 128 pages, as SGLang's controller does:
PortaKV's in place, ``file``'s by a copy of each page. PortaKV seals and verifies each page;
``file`` has no checks. A cold load comes from the disk, a warm one perhaps from the page cache,
which PortaKV does not use. With ``--faults`` it measures no speed: it lets so many faults of each
kind happen to the files, the disk and the process, and counts how pages came that a backend stored
before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from portakv_benchmarks.plugs import faults
from portakv_benchmarks.plugs.tier_result import result_of

#: The part of results.
PART = "hicache"
BATCH = 128  # pages, as in SGLang
PAGE = 64  # tokens
LAYERS = 8
HEADS = 8
DIM = 64
PAGE_BYTES = 2 * PAGE * LAYERS * HEADS * DIM * 2
MIB = 1 << 20
FAULTY = 64  # pages of faults, of 32 KiB: many small ones, so that a fault meets some of them
SMALL = 2  # tokens of such a page
HEADER = 4096  # bytes of an image before its page


class Pool:
    """A host pool of keys and values, page first, as SGLang lays it out."""

    layout = "page_first"
    dtype = torch.bfloat16

    def __init__(self, pages: int, page_size: int = PAGE) -> None:
        self.page_size = page_size
        self.page_bytes = 2 * page_size * LAYERS * HEADS * DIM * 2
        size = (2, pages * page_size, LAYERS, HEADS, DIM)
        self.kv_buffer = torch.zeros(size, dtype=self.dtype, device="cpu")
        self.fill(0)

    def fill(self, seed: int) -> None:
        """Write random bytes."""
        memory = self.kv_buffer.view(torch.uint8)
        made = torch.Generator().manual_seed(seed)
        memory.copy_(
            torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=made, device="cpu")
        )

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the addresses and sizes of keys and values of pages."""
        firsts = indices[:: self.page_size].tolist()
        places = [self.kv_buffer[side, at].data_ptr() for at in firsts for side in range(2)]
        return places, [self.page_bytes // 2] * len(places)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """Return a copy of a page."""
        return self.kv_buffer[:, index : index + self.page_size].flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return memory for a page, which SGLang fills with zeros."""
        return torch.zeros(self.page_bytes // 2, dtype=self.dtype, device="cpu")

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        """Write a page."""
        size = self.page_size
        self.kv_buffer[:, index : index + size] = page.reshape(2, size, LAYERS, HEADS, DIM)

    def tokens_of(self, firsts: Sequence[int]) -> torch.Tensor:
        """Return the indices of the tokens of pages."""
        starts = torch.tensor([*firsts], dtype=torch.int64, device="cpu")
        return (starts[:, None] + torch.arange(self.page_size, device="cpu")).flatten()


class Side(NamedTuple):
    """A backend, and how SGLang's controller stores and loads a batch with it.

    Attributes:
        name: of the backend.
        folder: its files.
        store: stores pages by their keys and first tokens; returns whether all are stored.
        load: loads them; returns for each page whether it came.
    """

    name: str
    folder: Path
    store: Callable[[Sequence[str], Sequence[int]], bool]
    load: Callable[[Sequence[str], Sequence[int]], Sequence[bool]]
    close: Callable[[], None]


def configuration(extra: dict[str, Any]) -> SimpleNamespace:
    """Return what SGLang passes to a backend."""
    numbers = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank", "dp_rank", "dcp_rank"), 0)
    sizes = dict.fromkeys(("tp_size", "pp_size", "attn_cp_size", "dcp_size"), 1)
    flags = {"is_mla_model": False, "should_split_heads": False, "is_storage_writer": True}
    return SimpleNamespace(**numbers, **sizes, **flags, model_name="org/model", extra_config=extra)


def portakv_side(pool: Pool, folder: Path, nbytes: int, **more: Any) -> Side:
    """Return PortaKV's backend, with pages in place, and room for so many bytes of them."""
    from portakv.integrations.sglang.hicache import PortaKVStorage

    terms = {"folder": str(folder), "host": 0, "staging": 512 * MIB, "capacity": nbytes, **more}
    backend = PortaKVStorage(configuration({"interface_v1": 1, "portakv": terms}))
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()

    def store(keys: Sequence[str], firsts: Sequence[int]) -> bool:
        return all(backend.batch_set_v1([*keys], pool.tokens_of(firsts)))

    def load(keys: Sequence[str], firsts: Sequence[int]) -> Sequence[bool]:
        return backend.batch_get_v1([*keys], pool.tokens_of(firsts))

    return Side("portakv", folder, store, load, backend.close)


def file_side(pool: Pool, folder: Path) -> Side:
    """Return SGLang's own backend, to which its controller passes copies of pages."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile

    backend: Any = HiCacheFile(configuration({}), str(folder))

    def store(keys: Sequence[str], firsts: Sequence[int]) -> bool:
        made = [pool.get_data_page(first) for first in firsts]
        return bool(backend.batch_set([*keys], made))

    def load(keys: Sequence[str], firsts: Sequence[int]) -> Sequence[bool]:
        targets = [pool.get_dummy_flat_data_page() for _ in keys]
        landed = backend.batch_get([*keys], targets)
        for first, page in zip(firsts, landed, strict=True):
            if page is not None:
                pool.set_from_flat_data_page(first, page)
        return [page is not None for page in landed]

    return Side("file", folder, store, load, lambda: None)


class Cost(NamedTuple):
    """What a turn took, for each MiB."""

    mib_s: float
    cpu_ms: float


def turn(work: Callable[[Sequence[str], Sequence[int]], Any], keys: Sequence[str]) -> Cost:
    """Measure batches of all pages."""
    firsts = [number * PAGE for number in range(len(keys))]
    cpu = time.process_time()
    began = time.perf_counter()
    for at in range(0, len(keys), BATCH):
        done = work(keys[at : at + BATCH], firsts[at : at + BATCH])
        assert done is True or all(done), "a page did not come"
    seconds = time.perf_counter() - began
    mib = len(keys) * PAGE_BYTES / MIB
    return Cost(mib / seconds, 1000 * (time.process_time() - cpu) / mib)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    pool: Pool, sides: Sequence[Side], pages: int, rounds: int
) -> tuple[bool, list[dict[str, Any]]]:
    """Print each backend's costs; return whether all bytes are right, and a row for each."""
    costs = dict[tuple[str, str], list[Cost]]()
    good = True
    for number in range(rounds):
        keys = [sha256(b"%d %d" % (number, page)).hexdigest() for page in range(pages)]
        for side in sides if number % 2 else reversed(sides):
            pool.fill(number)
            costs.setdefault((side.name, "store"), []).append(turn(side.store, keys))
            for kind in ("cold load", "warm load"):
                if kind == "cold load":
                    forget(side.folder)
                right = pool.kv_buffer.view(torch.uint8).clone()
                pool.kv_buffer.zero_()
                costs.setdefault((side.name, kind), []).append(turn(side.load, keys))
                good &= torch.equal(pool.kv_buffer.view(torch.uint8), right)
    rows = rows_of(costs)
    print(f"{'backend':<10}{'':<12}{'MiB/s':>8}{'CPU ms/MiB':>12}   medians of {rounds} rounds")
    for row in rows:
        print(f"{row['backend']:<10}{row['op']:<12}{row['mib_s']:>8.0f}{row['cpu_ms']:>12.2f}")
    return good, rows


def rows_of(costs: Mapping[tuple[str, str], Sequence[Cost]]) -> list[dict[str, Any]]:
    """Return a row for each backend and operation, with the median ratios of rounds to ``file``."""
    rows = list[dict[str, Any]]()
    for (name, kind), each in costs.items():
        own = costs["file", kind]
        pairs = [*zip(each, own, strict=True)]
        rows.append(
            {
                "backend": name,
                "op": kind,
                "mib_s": round(median(cost.mib_s for cost in each), 1),
                "cpu_ms": round(median(cost.cpu_ms for cost in each), 3),
                "rate_of_own": round(median(a.mib_s / b.mib_s for a, b in pairs), 3),
                "processor_of_own": round(median(a.cpu_ms / b.cpu_ms for a, b in pairs), 3),
                "rounds": len(each),
            }
        )
    return rows


class FaultyStore:
    """A backend over a folder with small pages, whose loads end soon, for `faults`."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.set_num_threads(1)
        self._pool = Pool(FAULTY, SMALL)
        self._folder = folder
        self._is_file = name == "file"
        self.files = "*.bin" if self._is_file else "slots"
        self.image = self._pool.page_bytes + (0 if self._is_file else HEADER)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._is_file:
            self._side = file_side(self._pool, folder)
        else:
            nbytes = FAULTY * self.image * 5 // 4
            more = {"deadline": faults.DEADLINE, "staging": 16 * MIB}
            self._side = portakv_side(self._pool, folder, nbytes, **more)
        self._firsts = [number * SMALL for number in range(FAULTY)]
        self._keys = list[str]()
        self._expected = self._pages()
        self._before = self._pool.kv_buffer.clone()
        self._landed: Sequence[bool] | None = None

    def _pages(self) -> list[torch.Tensor]:
        """Return copies of the bytes of the pool's pages."""
        pool = self._pool
        return [pool.get_data_page(first).view(torch.uint8) for first in self._firsts]

    def renew(self, seed: int) -> None:
        self._keys = [sha256(b"%d %d" % (seed, page)).hexdigest() for page in range(FAULTY)]
        self._pool.fill(seed)
        self._expected = self._pages()

    def save(self) -> None:
        if self._is_file:  # it removes no file itself
            for path in self._folder.glob(self.files):
                path.unlink()
        self._side.store(self._keys, self._firsts)

    def begin_load(self) -> None:
        self._pool.kv_buffer.zero_()
        self._landed = None
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        """Load pages, in a thread: SGLang's threads wait for theirs, too."""
        landed: Sequence[bool] = [False] * FAULTY
        try:
            landed = self._side.load(self._keys, self._firsts)
        except OSError:  # of ``file``: SGLang counts the batch as missing
            pass
        finally:
            self._landed = landed

    def ended(self) -> bool:
        return self._landed is not None

    def landed(self) -> list[bool]:
        return [*(self._landed or ())]

    def right(self) -> list[bool]:
        return [*map(torch.equal, self._pages(), self._expected)]

    def answers(self) -> Mapping[str, int]:
        return {}

    def touched(self) -> bool:
        now = self._pool.kv_buffer.clone()
        changed = not torch.equal(now.view(torch.uint8), self._before.view(torch.uint8))
        self._before = now
        return changed

    def close(self) -> None:
        self._side.close()


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if all bytes of loads without a fault are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder of a local disk")
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    faults.add_options(parser, ("portakv", "file"))
    args = parser.parse_args(words)
    # Teams of threads that spin for each other's work would slow the copies of ``file``.
    torch.set_num_threads(1)
    args.folder.mkdir(mode=0o700, exist_ok=bool(args.faults))
    if args.faults:
        faults.preload(args.folder, __spec__.name)
        terms = args.stores, args.folder, args.faults, args.kinds
        made = faults.damaged(FaultyStore, *terms, imports=["portakv.integrations.sglang_hicache"])
        results = {"load": os.getloadavg()[0], "faults": made}
        if args.json is not None:
            args.json.write_text(f"{json.dumps(results, indent=1)}\n")
        return 0
    print(f"{args.pages} pages of {PAGE_BYTES / MIB:g} MiB, batches of {BATCH}")
    pool = Pool(args.pages)
    sides = opened(pool, args.folder / "rounds", 4 * args.pages * args.rounds * PAGE_BYTES)
    good, rows = measure(pool, sides, args.pages, args.rounds)
    for side in sides:
        side.close()
    if args.json is not None and good:
        asked = {"pages": args.pages, "page_bytes": PAGE_BYTES, "rounds": args.rounds}
        releases = {"sglang": version("sglang")}
        result = result_of("cpu-sglang-hicache", PART, rows, releases, **asked)
        args.json.write_text(f"{json.dumps(result, indent=1)}\n")
    print("all bytes right" if good else "WRONG BYTES")
    return 0 if good else 1


def opened(pool: Pool, folder: Path, nbytes: int) -> list[Side]:
    """Return both backends, with files in a new folder."""
    folder.mkdir(mode=0o700)
    return [portakv_side(pool, folder / "portakv", nbytes), file_side(pool, folder / "file")]


if __name__ == "__main__":
    sys.exit(run())
