# SPDX-License-Identifier: Apache-2.0
"""What `explain` and `warmup` are asked about: example views of two layouts with equal extents, and
bytes and times as a person reads and writes them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple

import torch

from portakv.errors import DeviceMismatch, PortaKVError
from portakv.layout.language import Layout, parse
from portakv.layout.presets import resolve
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.devices import usable_device, usual_device
from portakv.view.bound import bind_layout
from portakv.view.example import example_tensors
from portakv.view.view import KVView

# What an axis has if the user does not say, and if a side does not write it.
LAYERS = 32
KV = 2
HEADS = 32
DIM = 128
BLOCK_SIZE = 16
TOKENS = 128
LATENT_DIM = 576  # of a row that is neither key nor value, as MLA stores it

_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True, slots=True)
class Extents:
    """What the user said of both sides; None: not said."""

    layers: int | None = None
    kv: int | None = None
    heads: int | None = None
    dim: tuple[int, ...] | None = None  # for each kv, or one for all
    block_size: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)  # for each side
    blocks: int | None = None
    tokens: int = TOKENS
    dtype: torch.dtype | None = None


def add_extents(group: Any, blocks: str = "blocks of a paged side (default: for --tokens)") -> None:
    """Add the options that say the extents of two sides."""

    def add(name: str, kind: Any, help: str | None = None, default: Any = None) -> None:
        metavar = "N[,N]" if kind in (_positives, _pair) else "N"
        group.add_argument(name, type=kind, metavar=metavar, help=help, default=default)

    add("--layers", positive)
    add("--kv", positive, "2 for keys and values")
    add("--heads", positive, "KV heads")
    add("--dim", _positives, "elements: of all kv, or for each kv")
    size = f"tokens of a block: of both sides, or source, destination (default: {BLOCK_SIZE})"
    add("--block-size", _pair, size, (BLOCK_SIZE, BLOCK_SIZE))
    add("--blocks", positive, blocks)
    add("--tokens", positive, f"default: {TOKENS}", TOKENS)
    group.add_argument("--dtype", type=_dtype, help="a torch dtype (default: float16)")


def said_extents(asked: argparse.Namespace) -> Extents:
    """What the options of `add_extents` were given."""
    return Extents(**{field.name: getattr(asked, field.name) for field in fields(Extents)})


def positive(text: str) -> int:
    """A number above 0; for argparse."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number above 0")


def _positives(text: str) -> tuple[int, ...]:
    return tuple(positive(word.strip()) for word in text.split(","))


def _pair(text: str) -> tuple[int, int]:
    numbers = _positives(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected one number or two")
    return numbers[0], numbers[-1]


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    raise argparse.ArgumentTypeError(f"{text!r} is no torch dtype; write float16, uint8, ...")


class Side(NamedTuple):
    """One side: what was asked, its layout and a view of example tensors."""

    asked: str
    layout: Layout
    view: KVView
    step: int  # tokens for each id of its index; 0: consecutive tokens, no ids


def make_sides(
    asked: tuple[str, str],
    said: Extents,
    device: torch.device,
    steps: tuple[int | None, int | None],
    whole_blocks: bool,
) -> tuple[Side, Side]:
    """Example views of two layouts, source first; the tensors are not written to.

    What is not said of extents is filled in alike on both sides. ``steps``: tokens for each id; of
    None, a block's on paged sides if ``whole_blocks``, else 1. Raises `LayoutError`, also for
    extents that a layout does not have, and `PortaKVError` for tensors that cannot be made.
    """
    resolved = [resolve(text) for text in asked]
    layouts = [parse(text) for text, _ in resolved]
    always: dict[str, Any] = {**resolved[0][1], **resolved[1][1]}
    declared = _extents(layouts, said, always)
    # The presets that fix a width count bytes: their rows mix dtypes.
    dtype = said.dtype or (torch.uint8 if "dim" in always else torch.float16)
    sides = []
    for text, layout, step, size in zip(asked, layouts, steps, said.block_size, strict=True):
        view = _view(text, layout, declared, said, size, dtype, device)
        if step is None:
            step = (size if whole_blocks or layout.opaque else 1) if layout.paged else 0
        sides.append(Side(text, layout, view, step))
    return sides[0], sides[1]


def _extents(layouts: Sequence[Layout], said: Extents, always: Mapping[str, Any]) -> dict[str, Any]:
    """layers, kv, heads and dim for both sides. An axis that a side does not write has extent 1,
    so unless it was said it has extent 1 on the other side too."""

    def on_both(axis: str) -> bool:
        return all(axis in layout.axes for layout in layouts)

    widths = always.get("dim") if said.dim is None else said.dim
    if widths is None:
        widths = DIM if on_both("kv") else LATENT_DIM
        if any(layout.opaque for layout in layouts):
            widths *= said.block_size[0]
    elif isinstance(widths, tuple) and len(widths) == 1:
        widths = widths[0]
    found = {"dim": widths}
    kv = len(widths) if isinstance(widths, tuple) else KV
    known = ("layers", "layer", LAYERS), ("kv", "kv", kv), ("heads", "head", HEADS)
    for name, axis, usual in known:
        value = getattr(said, name) or always.get(name)
        found[name] = value or (usual if on_both(axis) else 1)
    return found


def _view(
    text: str,
    layout: Layout,
    declared: Mapping[str, Any],
    said: Extents,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVView:
    bound = bind_layout(text, **declared, block_size=size if layout.paged else None)
    made = {
        "blocks": said.blocks or max(2, -(-said.tokens // size)),
        "tokens": size if layout.paged else said.tokens,
    }
    try:
        tensors = example_tensors(text, **declared, **made, dtype=dtype, device=device)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch, of a size it cannot make
        why = str(error).splitlines()[0]
        raise PortaKVError(
            f"Example tensors of {layout.text!r} could not be made on {device} ({why}); ask for "
            f"fewer --blocks, --tokens or --layers."
        ) from error
    return KVView.through(bound, tensors)


def accelerator_asked(name: str | None) -> torch.device | None:
    """The accelerator of that name, with its index; by default this machine's. None: the CPU.
    Raises `DeviceMismatch` if torch cannot use it, or it has no memory to copy from."""
    usual = usual_device()
    device = usual if name is None else usable_device(name)
    if device.index is None and device.type not in ("cpu", usual.type):
        raise DeviceMismatch(
            f"Device {name!r} was asked about copies between it and the host, but torch does not "
            f"take it for an accelerator here; name one that torch.accelerator lists."
        )
    found = usual if device.index is None else device
    return None if device.type == "cpu" else found


def check_cache(what: str) -> None:
    """Raise `PortaKVError` if ``what`` cannot be kept in the cache's folder."""
    why = _kernel_cache.refusal()
    name = _kernel_cache.ENVIRONMENT
    if why is not None:
        folder = "a folder that only you can write to"
        raise PortaKVError(f"{what} cannot be kept: {why}. Set {name} to {folder}.")


def in_bytes(number: int) -> str:
    """``64 KiB``, ``1.5 GiB``."""
    size = float(number)
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size = size / 1024
        units = units[1:]
    return f"{size:.4g} {units[0]}"


def in_time(seconds: float) -> str:
    """``85.2 us``, ``4.71 ms``, ``1.2 s``."""
    unit, factor = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    return f"{seconds * factor:.3g} {unit}"


def read_bytes(text: str) -> int:
    """A number of bytes above 0, as in ``32768``, ``32K``, ``64MiB``; for argparse."""
    found = re.fullmatch(r"(\d+)\s*(?:([kmg])(?:i?b)?|b?)", text.strip(), re.IGNORECASE)
    if found and int(found[1]):
        return int(found[1]) * _BYTES[(found[2] or "").lower()]
    expected = "expected bytes above 0, such as 32768, 32K or 64M"
    raise argparse.ArgumentTypeError(f"{text!r} was given, {expected}")


def read_above_zero(text: str, what: str = "seconds above 0") -> float:
    """A number above 0; for argparse, whose error says what was expected."""
    with suppress(ValueError):
        if 0 < float(text) < inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} was given, expected {what}")
