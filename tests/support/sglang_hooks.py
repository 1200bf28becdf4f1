# SPDX-License-Identifier: Apache-2.0
"""A walk through the hooks of a storage backend of HiCache, over a pool that is no engine's.

    python -m support.sglang_hooks FOLDER

Prints what was wrong, a line each; the stand-in that `sglang_stub.write_sglang` makes must be
found.
"""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

from support.sglang_stub import configuration

PAGE = 4
PAGES = 32
WIDTH = 96  # bytes of a token, of keys and of values


class Pool:
    """A host pool of keys and values, whose pages have two pieces."""

    page_size = PAGE
    layout = "page_first"
    dtype = torch.uint8

    def __init__(self) -> None:
        self.memory = torch.zeros((2, PAGES * PAGE, WIDTH), dtype=torch.uint8)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the addresses and sizes of the pieces of pages."""
        firsts = indices[::PAGE].tolist()
        places = [self.memory[side, first].data_ptr() for first in firsts for side in range(2)]
        return places, [PAGE * WIDTH] * len(places)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """Return a page."""
        return self.memory[:, index : index + PAGE].flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return memory for a page."""
        return torch.zeros(2 * PAGE * WIDTH, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write a page."""
        self.memory[:, index : index + PAGE] = data_page.view(2, PAGE, WIDTH)


def tokens_of(pages: range) -> torch.Tensor:
    """Return the indices of the tokens of pages."""
    return torch.arange(pages.start * PAGE, pages.stop * PAGE)


def walk(folder: str, in_place: bool) -> list[str]:
    """Return what was wrong."""
    from portakv.integrations.sglang.hicache import PortaKVStorage

    terms = {"folder": folder, "host": 0, "staging": 1 << 20, "capacity": 4 << 20}
    config: Any = configuration(terms)
    config.extra_config["interface_v1"] = int(in_place)
    pool = Pool()
    backend = PortaKVStorage(config)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    keys = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(6)]
    pool.memory.copy_(torch.randint(0, 256, pool.memory.shape, dtype=torch.uint8))
    right = pool.memory[:, : 4 * PAGE].clone()
    before = SimpleNamespace(prefix_keys=[])
    if in_place:
        stored = backend.batch_set_v1(keys[:4], tokens_of(range(4)), before)
    else:
        pages = [pool.get_data_page(number * PAGE) for number in range(4)]
        stored = [backend.batch_set(keys[:4], pages)] * 4
    backend.close()

    backend = PortaKVStorage(config)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    found = backend.batch_exists(keys)
    pool.memory.zero_()
    if in_place:
        landed = backend.batch_get_v1(keys[:5], tokens_of(range(8, 13)), before)
        got = pool.memory[:, 8 * PAGE : 12 * PAGE]
    else:
        targets = [pool.get_dummy_flat_data_page() for _ in keys[:5]]
        made = backend.batch_get(keys[:5], targets)
        landed = [page is not None for page in made]
        rows = [page.view(2, PAGE, WIDTH) for page in targets[:4]]
        got = torch.cat(rows, 1)
    backend.close()
    checks = {
        "stored": stored == [True] * 4,
        "found": found == 4,
        "landed": landed == [True] * 4 + [False],
        "bytes": torch.equal(got, right),
    }
    return [f"in place {in_place}: {name}" for name, good in checks.items() if not good]


if __name__ == "__main__":
    wrong = [*walk(f"{sys.argv[1]}/in-place", True), *walk(f"{sys.argv[1]}/copies", False)]
    print("\n".join(wrong) or "right")
