# SPDX-License-Identifier: Apache-2.0
"""The power-on self-check: copy a known pattern on the device, and compare every byte.

The copy goes through a backend's ``check``, ``prepare`` and launch, as the library calls them.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto

import torch

from portakv.backends.base import Backend
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan
from portakv.view.index import Index
from portakv.view.view import KVView

_LAYERS = 2
_BLOCKS = 4
_BLOCK_SIZE = 16
_HEADS = 2
_DIM = 32
_SLOTS = [37, 2, 63, 16, 15, 0, 48, 21]
#: Of all launches whose backends do not claim ``threads``: they may share more than a launch.
_one_at_a_time: threading.Lock


def turn(threads: bool) -> AbstractContextManager[object]:
    """Return the context of a launch by a backend that claims ``threads``, or that does not."""
    return nullcontext() if threads else _one_at_a_time


def _renew() -> None:
    """Begin with a free lock: a forked process lacks the thread of its parent that may have it."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


_renew()
os.register_at_fork(after_in_child=_renew)


class SelfCheck(Enum):
    """The result of a self-check."""

    PASSED = auto()
    FAILED = auto()
    UNCHECKABLE = auto()  # the backend takes no test pattern, so that its bytes stay unchecked


#: Tried in turn: a backend need take only one of them.
_PATTERNS = (
    "layer | kv block token head dim",
    "layer | kv block head token dim",
    "layer kv | block token head dim",
    "layer kv | block head token dim",
)


def self_check(backend: Backend) -> tuple[SelfCheck, str]:
    """Gather and scatter the pattern; return the result, and the reason as a phrase.

    The check fails at the first wrong byte, and if the backend raises.
    """
    refused = ""
    for layout in _PATTERNS:
        try:
            why = _try_pattern(backend, layout)
        except Unsupported as error:
            refused = str(error)
            continue
        except Exception as error:  # any error of a backend is its failure
            return SelfCheck.FAILED, f"its self-check raised {type(error).__name__}: {error}"
        if why:
            return SelfCheck.FAILED, f"its self-check failed: {why}"
        return SelfCheck.PASSED, "self-check passed, every byte right"
    why = f"it could not be self-checked, since it takes no test pattern ({refused}); it is used "
    return SelfCheck.UNCHECKABLE, f"{why}only when forced"


def _try_pattern(backend: Backend, layout: str) -> str | None:
    """Copy the pattern there and back; return the first fault, or None."""
    size = (_LAYERS, 2, _BLOCKS, _BLOCK_SIZE, _HEADS, _DIM)
    # Distinct bytes of every value, including NaN patterns, at odd distances.
    numbers = torch.arange(math.prod(size), dtype=torch.int64, device="cpu")
    known = (numbers * 2654435761 % 65521).to(torch.int16).view(size)
    heads_first = "head token" in layout
    ordered = known.transpose(3, 4) if heads_first else known
    pool = [layer.contiguous().to(backend.device) for layer in ordered]
    target = [torch.full_like(layer, -1) for layer in pool]
    paged = _view_of(pool, layout)
    empty = _view_of(target, layout)

    expected = known.flatten(2, 3)[:, :, _SLOTS].transpose(0, 1)
    chunk = torch.full_like(expected.contiguous(), -1)
    places = backend.capabilities().places
    if ("device", "device") in places:
        chunk = chunk.to(backend.device)
    elif ("device", "pinned") in places:  # a transfer strategy
        chunk = chunk.pin_memory()
    dense = KVView(chunk, "kv layer token head dim")

    _copy(backend, paged, dense, 1, 0)
    if not chunk.cpu().equal(expected):
        return f"{_wrong(chunk.cpu(), expected)} gathering {layout!r}"

    _copy(backend, dense, empty, 0, 1)
    wanted = torch.full_like(known, -1)
    wanted.flatten(2, 3)[:, :, _SLOTS] = expected.transpose(0, 1)
    arrived = torch.stack([layer.cpu() for layer in target])
    wanted = wanted.transpose(3, 4) if heads_first else wanted
    return None if arrived.equal(wanted) else f"{_wrong(arrived, wanted)} scattering {layout!r}"


def _view_of(layers: list[torch.Tensor], layout: str) -> KVView:
    """Return a view of layers whose first axis is kv, which some layouts name as a container."""
    if "layer kv |" in layout:
        return KVView([tuple(layer) for layer in layers], layout)
    return KVView(layers, layout)


def _copy(backend: Backend, src: KVView, dst: KVView, src_step: int, dst_step: int) -> None:
    plan = CopyPlan(src.form, dst.form, src_step, dst_step)
    decision = backend.check(plan)
    if not decision.accepted:
        raise Unsupported(f"The self-check through {backend.name}", decision.reason)
    launch = backend.prepare(plan)
    can = backend.capabilities()
    ids = Index(_SLOTS).placed(can.home_of_ids(backend.device), can.index_dtypes)
    indices = (ids, Index()) if src_step else (Index(), ids)
    with turn(can.threads):
        pending = launch(src, dst, *indices, len(_SLOTS), None, None)
    if pending is not None:
        pending.wait()
    if backend.device.type != "cpu":
        torch.accelerator.synchronize(backend.device)


def _wrong(actual: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = (actual != expected).nonzero()
    return f"{len(wrong)} of {expected.numel()} elements wrong, first at {wrong[0].tolist()},"
