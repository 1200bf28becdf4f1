# SPDX-License-Identifier: Apache-2.0
"""Describe the two sides of a copy: example views with equal extents, and shapes of real caches.

`explain` and `warmup` copy between example views. `warmup` and the benchmarks read the shapes of
real models' caches from ``shapes.toml``. Also reads and formats bytes and times for people.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from portakv.arguments import size_text
from portakv.errors import DeviceMismatch, PortaKVError
from portakv.extras import installing
from portakv.layout.language import Layout, parse
from portakv.layout.presets import resolve
from portakv.runtime import kernel_cache
from portakv.runtime.devices import usable_device, usual_device
from portakv.view.bound import bind_layout
from portakv.view.example import example_tensors
from portakv.view.view import KVView

# Extents of axes that the user does not set.
LAYERS = 32
KV = 2
HEADS = 32
DIM = 128
BLOCK_SIZE = 16
TOKENS = 128
LATENT_DIM = 576  # the width of a row that is neither key nor value, as MLA stores it

#: Extents by name, as `portakv.view.bound` takes them.
Declared: TypeAlias = Mapping[str, Any]

#: The bytes of a unit, in small letters. A letter alone means the power of two.
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}


@dataclass(frozen=True, slots=True)
class Extents:
    """The extents that the user requested for both sides; None: not requested."""

    layers: int | None = None
    kv: int | None = None
    heads: int | None = None
    dim: tuple[int, ...] | None = None  # for each kv, or one for all
    block_size: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)  # for each side
    blocks: int | None = None
    tokens: int = TOKENS
    dtype: torch.dtype | None = None


def add_extents(
    group: argparse._ArgumentGroup,
    blocks: str = "blocks of a paged side (default: for --tokens)",
) -> None:
    """Add the options for the extents of two sides."""

    add = group.add_argument
    add("--layers", type=positive, metavar="N")
    add("--kv", type=positive, metavar="N", help="2 for keys and values")
    add("--heads", type=positive, metavar="N", help="KV heads")
    add("--dim", type=_positives, metavar="N[,N]", help="elements: of all kv, or for each kv")
    add(
        "--block-size",
        type=_pair,
        metavar="N[,N]",
        help=f"tokens of a block: of both sides, or source, destination (default: {BLOCK_SIZE})",
        default=(BLOCK_SIZE, BLOCK_SIZE),
    )
    add("--blocks", type=positive, metavar="N", help=blocks)
    add("--tokens", type=positive, metavar="N", help=f"default: {TOKENS}", default=TOKENS)
    add("--dtype", type=_dtype, help="a torch dtype (default: float16)")


def extents_of(args: argparse.Namespace) -> Extents:
    """Return the values of the options of `add_extents`."""
    return Extents(**{field.name: getattr(args, field.name) for field in fields(Extents)})


def positive(text: str) -> int:
    """Return a number above 0, or raise argparse's error."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _positives(text: str) -> tuple[int, ...]:
    return tuple(positive(word.strip()) for word in text.split(","))


def _pair(text: str) -> tuple[int, int]:
    numbers = _positives(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"expected one number or two, got {text!r}")
    return numbers[0], numbers[-1]


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    message = f"expected a torch dtype such as float16 or uint8, got {text!r}"
    raise argparse.ArgumentTypeError(message)


class Side(NamedTuple):
    """One side: the requested text, its layout and a view of example tensors."""

    requested: str
    layout: Layout
    view: KVView
    step: int  # tokens for each id of its index; 0: consecutive tokens, no ids


def make_sides(
    requested: tuple[str, str],
    extents: Extents,
    device: torch.device,
    steps: tuple[int | None, int | None],
    whole_blocks: bool,
) -> tuple[Side, Side]:
    """Return example views of two layouts, source first; the tensors are not written to.

    Extents that were not requested get equal values on both sides. ``steps`` are the tokens for
    each id. None on a paged side means the tokens of a block if ``whole_blocks``, else 1.

    Raises:
        LayoutError: a layout is wrong, or does not have a requested extent.
        PortaKVError: the tensors cannot be made.
    """
    resolved = [resolve(text) for text in requested]
    layouts = [parse(text) for text, _ in resolved]
    fixed = {**resolved[0][1], **resolved[1][1]}  # by presets
    declared = _extents(layouts, extents, fixed)
    # The presets that fix a width count bytes: their rows mix dtypes.
    dtype = extents.dtype or (torch.uint8 if "dim" in fixed else torch.float16)
    sides = []
    for text, layout, step, size in zip(requested, layouts, steps, extents.block_size, strict=True):
        view = _view(text, layout, declared, extents, size, dtype, device)
        if step is None:
            step = (size if whole_blocks or layout.opaque else 1) if layout.paged else 0
        sides.append(Side(text, layout, view, step))
    return sides[0], sides[1]


def _extents(layouts: Sequence[Layout], extents: Extents, fixed: Declared) -> dict[str, Any]:
    """Return layers, kv, heads and dim for both sides.

    An axis that one side does not write has extent 1 there. It then has extent 1 on the other side
    too, unless the user requested another extent.
    """

    def on_both(axis: str) -> bool:
        return all(axis in layout.axes for layout in layouts)

    widths = fixed.get("dim") if extents.dim is None else extents.dim
    if widths is None:
        widths = DIM if on_both("kv") else LATENT_DIM
        if any(layout.opaque for layout in layouts):
            widths *= extents.block_size[0]
    elif isinstance(widths, tuple) and len(widths) == 1:
        widths = widths[0]
    declared = {"dim": widths}
    kv = len(widths) if isinstance(widths, tuple) else KV
    known = ("layers", "layer", LAYERS), ("kv", "kv", kv), ("heads", "head", HEADS)
    for name, axis, usual in known:
        value = getattr(extents, name) or fixed.get(name)
        declared[name] = value or (usual if on_both(axis) else 1)
    return declared


def _view(
    text: str,
    layout: Layout,
    declared: Declared,
    extents: Extents,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVView:
    bound = bind_layout(text, **declared, block_size=size if layout.paged else None)
    made = {
        "blocks": extents.blocks or max(2, -(-extents.tokens // size)),
        "tokens": size if layout.paged else extents.tokens,
    }
    try:
        tensors = example_tensors(text, **declared, **made, dtype=dtype, device=device)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch cannot make that size
        why = str(error).splitlines()[0]
        raise PortaKVError(
            f"Example tensors of {layout.text!r} could not be made on {device} ({why}). Use fewer "
            f"--blocks, --tokens or --layers."
        ) from error
    return KVView.through(bound, tensors)


def device_of(name: str | None) -> torch.device:
    """Return a named device, by default that of this machine."""
    return usual_device() if name is None else usable_device(name)


def requested_accelerator(name: str | None) -> torch.device | None:
    """Return the named accelerator with its index, by default this machine's; None for the CPU.

    Raises `DeviceMismatch` if torch cannot use it, or it has no memory to copy from.
    """
    usual = usual_device()
    device = device_of(name)
    if device.index is None and device.type not in ("cpu", usual.type):
        raise DeviceMismatch(
            f"Expected an accelerator for copies between it and the host, got {name!r}, which "
            f"torch does not list here. Name a device that torch.accelerator lists."
        )
    if device.type == "cpu":
        return None
    return usual if device.index is None else device


def check_cache(what: str) -> None:
    """Raise `PortaKVError` if ``what`` cannot be stored in the cache's folder."""
    why = kernel_cache.refusal()
    name = kernel_cache.ENVIRONMENT
    if why is not None:
        folder = "a folder that only you can write to"
        raise PortaKVError(f"{what} cannot be stored: {why}. Set {name} to {folder}.")


def in_bytes(number: int) -> str:
    """Return bytes as text: ``64 KiB``, ``1.5 GiB``."""
    return size_text(number, digits=4)


def in_time(seconds: float) -> str:
    """Return a time as text: ``85.2 us``, ``4.71 ms``, ``1.2 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def read_bytes(text: str, least: int = 1) -> int:
    """Return a number of bytes, or raise argparse's error.

    ``64MB`` is 64 * 10^6; ``64MiB`` and ``64M`` are 64 * 2^20; ``32768`` has no unit.

    ``least``: 1, or 0 if no bytes are a number too.
    """
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match and int(match[1]) >= least and match[2].lower() in _BYTES:
        unit: int = _BYTES[match[2].lower()]
        return int(match[1]) * unit
    expected = f"expected bytes{' above 0' if least else ''}, such as 32768, 64MB or 64MiB"
    raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")


def read_above_zero(text: str, what: str = "seconds above 0") -> float:
    """Return a number above 0, or raise argparse's error, which names ``what`` was expected."""
    with suppress(ValueError):  # the text is not a number
        if 0 < float(text) < inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")


SHAPES = Path(__file__).resolve().parent / "shapes.toml"

#: What an index list can be: slots drawn at random, one run of slots, block ids drawn at random.
INDEX_KINDS = ("random", "contiguous", "blocks")


@dataclass(frozen=True, slots=True)
class Shape:
    """Describe the rows that one transfer moves."""

    name: str  # what `--shape` takes
    model: str  # whose cache it is
    source: str  # where the numbers come from
    cache: str  # its layout
    chunk: str  # likewise
    layers: int
    dim: int  # in elements
    dtype: str  # a torch dtype's name
    block_size: int  # tokens of a block
    tokens: int  # moved by one copy, a multiple of ``block_size``
    kv: int = 2
    heads: int = 1
    pool: int = 4  # slots of the cache for each token moved
    index: tuple[str, ...] = INDEX_KINDS  # index lists to measure with
    objects: int = 3  # memory objects of each kind that the timed calls take turns with
    apart: bool = True  # measured with each layer in a separate allocation
    together: bool = True  # and with all in one
    compiled: bool = False  # backends that compile for seconds are measured with it

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one token in one plane."""
        return self.heads * self.dim * self.torch_dtype.itemsize

    @property
    def payload(self) -> int:
        """Return the bytes moved, each counted once."""
        return self.layers * self.kv * self.tokens * self.row_bytes

    @property
    def blocks(self) -> int:
        """Return the number of blocks of the cache."""
        return -(-self.pool * self.tokens // self.block_size)

    @property
    def slots(self) -> int:
        """Return the number of token slots of the cache, the size of the pool."""
        return self.blocks * self.block_size

    @property
    def slots_used(self) -> float:
        """Return the share of the pool that one transfer touches."""
        return self.tokens / self.slots

    @property
    def layered(self) -> bool:
        """Return True if the cache is a list over layers, whose allocations can differ."""
        return self.cache.partition("|")[0].split() == ["layer"]


def load_shapes() -> Mapping[str, Shape]:
    """Return the shapes of real models' caches by name, in the order of their file.

    An entry with ``like`` has every field that it does not write from the shape of that name.

    Raises:
        PortaKVError: Python 3.10 without tomli, which reads such files.
    """
    results: dict[str, Shape] = {}
    for entry in _toml_reader().loads(SHAPES.read_text(encoding="utf-8"))["shape"]:
        like = entry.pop("like", None)
        shape = Shape(**{**(asdict(results[like]) if like else {}), **entry})
        results[shape.name] = replace(shape, index=tuple(shape.index))
    return MappingProxyType(results)


def _toml_reader() -> ModuleType:
    """Return the module that reads TOML: Python's own, or tomli for Python 3.10."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PortaKVError(
            f"Shapes are read by tomli on Python 3.10, and it is not installed. Run "
            f"{installing('cuda')}, or name two layouts with --layout."
        ) from error
