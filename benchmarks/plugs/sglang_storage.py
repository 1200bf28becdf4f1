# SPDX-License-Identifier: Apache-2.0
"""SGLang's storage backends of HiCache: its own ``file``, and PortaKV's, in turns.

    python -m portakv_benchmarks.plugs.sglang_storage FOLDER [--pages 256] [--rounds 5]
        [--faults 200]

Pages of a host pool are stored and loaded in batches of 128 pages, as SGLang's controller does:
PortaKV's in place, ``file``'s by a copy of each page. PortaKV seals and verifies each page;
``file`` has no checks. A cold load comes from the disk, a warm one perhaps from the page cache,
which PortaKV does not use. With ``--faults`` stored pages are damaged, one at a time, and what each
backend returns is compared with the right bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from portakv_benchmarks.shared.harness import in_a_line

BATCH = 128  # pages, as in SGLang
PAGE = 64  # tokens
LAYERS = 8
HEADS = 8
DIM = 64
MIB = 1 << 20
FAULTY = 8  # pages, of which some are damaged
HEADER = 4096  # bytes of an image before its page


class Pool:
    """A host pool of keys and values, page first, as SGLang lays it out."""

    page_size = PAGE
    layout = "page_first"
    dtype = torch.bfloat16
    page_bytes = 2 * PAGE * LAYERS * HEADS * DIM * 2

    def __init__(self, pages: int) -> None:
        size = (2, pages * PAGE, LAYERS, HEADS, DIM)
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
        firsts = indices[::PAGE].tolist()
        places = [self.kv_buffer[side, at].data_ptr() for at in firsts for side in range(2)]
        return places, [self.page_bytes // 2] * len(places)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """Return a copy of a page."""
        return self.kv_buffer[:, index : index + PAGE].flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return memory for a page, which SGLang fills with zeros."""
        return torch.zeros(self.page_bytes // 2, dtype=self.dtype, device="cpu")

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        """Write a page."""
        self.kv_buffer[:, index : index + PAGE] = page.reshape(2, PAGE, LAYERS, HEADS, DIM)


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


def portakv_side(pool: Pool, folder: Path, nbytes: int) -> Side:
    """Return PortaKV's backend, with pages in place."""
    from portakv.integrations.sglang_hicache import PortaKVStorage

    terms = {"folder": str(folder), "host": 0, "staging": 512 * MIB, "capacity": 4 * nbytes}
    backend = PortaKVStorage(configuration({"interface_v1": 1, "portakv": terms}))
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()

    def store(keys: Sequence[str], firsts: Sequence[int]) -> bool:
        return all(backend.batch_set_v1([*keys], tokens_of(firsts)))

    def load(keys: Sequence[str], firsts: Sequence[int]) -> Sequence[bool]:
        return backend.batch_get_v1([*keys], tokens_of(firsts))

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


def tokens_of(firsts: Sequence[int]) -> torch.Tensor:
    """Return the indices of the tokens of pages."""
    starts = torch.tensor([*firsts], dtype=torch.int64, device="cpu")
    return (starts[:, None] + torch.arange(PAGE, device="cpu")).flatten()


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
    mib = len(keys) * Pool.page_bytes / MIB
    return Cost(mib / seconds, 1000 * (time.process_time() - cpu) / mib)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(pool: Pool, sides: Sequence[Side], pages: int, rounds: int) -> bool:
    """Print each backend's costs; return whether all bytes are right."""
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
    print(f"{'backend':<10}{'':<12}{'MiB/s':>8}{'CPU ms/MiB':>12}   medians of {rounds} rounds")
    for (name, kind), each in costs.items():
        rate = median(cost.mib_s for cost in each)
        cpu = median(cost.cpu_ms for cost in each)
        print(f"{name:<10}{kind:<12}{rate:>8.0f}{cpu:>12.2f}")
    return good


def places(side: Side) -> list[tuple[Path, int]]:
    """Return the file and the place of each stored page."""
    if side.name == "file":
        return [(path, 0) for path in sorted(side.folder.glob("*.bin"))]
    size = HEADER + -(-Pool.page_bytes // HEADER) * HEADER
    found = []
    for path in sorted(side.folder.rglob("slots")):
        with path.open("rb") as file:
            for at in range(0, path.stat().st_size, size):
                file.seek(at)
                if any(file.read(64)):
                    found.append((path, at + HEADER))
    return found


def damage(side: Side, draw: random.Random) -> Callable[[], None]:
    """Flip a bit of a page, swap two, or cut one; return what undoes it."""
    chosen = draw.sample(places(side), 2)
    nbytes = Pool.page_bytes
    before = []
    for path, at in chosen:
        with path.open("rb") as file:
            file.seek(at)
            before.append(file.read(nbytes))
    kind = draw.choice(("flip", "swap", "cut"))
    after = list(before)
    if kind == "flip":
        place = draw.randrange(nbytes)
        bit = 1 << draw.randrange(8)
        changed = bytes([before[0][place] ^ bit])
        after[0] = before[0][:place] + changed + before[0][place + 1 :]
    elif kind == "swap":
        after.reverse()
    else:
        after[0] = before[0][: nbytes // 2]  # of slots: what follows is zeros
    write(side, chosen, after)
    return lambda: write(side, chosen, before)


def write(side: Side, chosen: Sequence[tuple[Path, int]], pages: Sequence[bytes]) -> None:
    """Write pages to their places; cut the file of a short one, if it has no other page."""
    for (path, at), page in zip(chosen, pages, strict=True):
        with path.open("r+b") as file:
            file.seek(at)
            if side.name == "file":
                file.truncate(len(page))
            file.write(page if side.name == "file" else page.ljust(Pool.page_bytes, b"\0"))
            file.flush()
            os.fsync(file.fileno())


def count_faults(pool: Pool, side: Side, faults: int) -> None:
    """Damage stored pages, and print what the backend returned."""
    pages = FAULTY
    draw = random.Random(1)
    pool.fill(7)
    keys = [sha256(b"fault %d" % page).hexdigest() for page in range(pages)]
    firsts = [page * PAGE for page in range(pages)]
    side.store(keys, firsts)
    right = [pool.get_data_page(first).view(torch.uint8).clone() for first in firsts]
    wrong = 0
    missing = 0
    raised = 0
    for _ in range(faults):
        undo = damage(side, draw)
        pool.kv_buffer.zero_()
        try:
            landed = [*side.load(keys, firsts)]
        except OSError as error:
            raised += 1
            landed = [False] * pages
            if raised == 1:
                print(f"{side.name}: raised {in_a_line(error)}", file=sys.stderr)
        undo()
        got = [pool.get_data_page(first).view(torch.uint8) for first in firsts]
        same = [*map(torch.equal, got, right)]
        wrong += any(there and not fine for there, fine in zip(landed, same, strict=True))
        missing += not all(landed)
        for page, first in zip(right, firsts, strict=True):
            pool.set_from_flat_data_page(first, page.view(Pool.dtype))
        side.store(keys, firsts)
    print(
        f"{side.name}: {faults} faults, {wrong} with wrong bytes, {missing} with misses, of which "
        f"{raised} raised an error for the whole batch"
    )


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if all bytes of loads without a fault are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder of a local disk")
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--faults", type=int, default=0)
    args = parser.parse_args(words)
    # Teams of threads that spin for each other's work would slow the copies of ``file``.
    torch.set_num_threads(1)
    nbytes = args.pages * args.rounds * Pool.page_bytes
    args.folder.mkdir(mode=0o700)
    print(f"{args.pages} pages of {Pool.page_bytes / MIB:g} MiB, batches of {BATCH}")
    good = True
    if args.rounds:
        pool = Pool(args.pages)
        sides = opened(pool, args.folder / "rounds", nbytes)
        good = measure(pool, sides, args.pages, args.rounds)
        for side in sides:
            side.close()
    if args.faults:
        pool = Pool(FAULTY)
        for side in opened(pool, args.folder / "faults", 64 * Pool.page_bytes):
            count_faults(pool, side, args.faults)
            side.close()
    print("all bytes right" if good else "WRONG BYTES")
    return 0 if good else 1


def opened(pool: Pool, folder: Path, nbytes: int) -> list[Side]:
    """Return both backends, with files in a new folder."""
    folder.mkdir(mode=0o700)
    return [portakv_side(pool, folder / "portakv", nbytes), file_side(pool, folder / "file")]


if __name__ == "__main__":
    sys.exit(run())
