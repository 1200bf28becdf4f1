# SPDX-License-Identifier: Apache-2.0
"""Planes whose rows lie apart and are of different widths, in one copy: what an engine keeps
of multi-head latent attention, a latent and a rotary key for each token, side by side."""

from __future__ import annotations

import pytest
import torch
from support.core_cases import noise
from support.guarded_memory import refused

from portakv import KVView, LayoutError, copy_rows

LATENT = 512
ROPE = 64
BLOCKS = 10
SIZE = 16
SLOTS = [33, -1, 0, 159, 7, 34]
WIDTHS = (LATENT, ROPE)


def rows(device: torch.device, wide: bool) -> list[torch.Tensor]:
    """A latent and a rotary key for each token; ``wide``: columns of one projection."""
    both = noise(len(SLOTS), LATENT + ROPE).to(device)
    return list(both.split(WIDTHS, 1)) if wide else [x.contiguous() for x in both.split(WIDTHS, 1)]


def cache(device: torch.device) -> torch.Tensor:
    return noise(BLOCKS, SIZE, LATENT + ROPE, seed=3).to(device)


def views(tensors: list[torch.Tensor], memory: torch.Tensor) -> tuple[KVView, KVView]:
    return (
        KVView(tensors, "kv | token dim", dim=WIDTHS),
        KVView(memory, "block token (kv dim)", dim=WIDTHS),
    )


@pytest.mark.parametrize("wide", [False, True], ids=["apart", "columns"])
@pytest.mark.parametrize("store", [True, False])
def test_every_byte(device: torch.device, wide: bool, store: bool) -> None:
    tensors = rows(device, wide)
    memory = cache(device)
    expected = memory.cpu().view(-1, LATENT + ROPE)
    wanted = torch.cat(tensors, 1).cpu()
    for position, slot in enumerate(SLOTS):
        if slot >= 0 and store:
            expected[slot] = wanted[position]
        elif slot >= 0:
            wanted[position] = expected[slot]
    some, paged = views(tensors, memory)
    ids = torch.tensor(SLOTS, device=device)
    if store:
        copy_rows(some, paged, None, ids).synchronize()
        assert torch.equal(memory.cpu().view(expected.shape), expected)
    else:
        copy_rows(paged, some, ids).synchronize()
        assert torch.equal(torch.cat(tensors, 1).cpu(), wanted)


def test_widths_that_differ_are_named() -> None:
    tensors = rows(torch.device("cpu"), False)
    memory = cache(torch.device("cpu"))
    some = KVView(tensors[::-1], "kv | token dim", dim=WIDTHS[::-1])
    with refused(LayoutError, "1024", "128", watch=[memory]):
        copy_rows(some, views(tensors, memory)[1], None, SLOTS)
