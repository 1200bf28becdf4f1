# SPDX-License-Identifier: Apache-2.0
"""Choose whether rows are packed before they cross a link: by the rates of the link and of packing,
and by the escapes of a sample of real blocks.

The rates are those of copies of packed and of raw rows between a device and the host, measured once
in a process. The table of `portakv calibrate` has the costs of raw runs on an idle device. A packed
copy costs the host more than its kernels cost the device, so that the time by the wall decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import instance, rate
from portakv.backends.reference_pack import escapes_of
from portakv.copy.encodings import to_host
from portakv.copy.options import Ids
from portakv.copy.rows import copy_blocks
from portakv.errors import InvalidTerms, PortaKVError, SlotError, Unsupported
from portakv.host import pinned
from portakv.interconnect import costs
from portakv.layout.encodings import CODE_BITS, PACK, PACKED_DTYPE, Pack, slot_for
from portakv.registry import choose
from portakv.runtime.devices import inside
from portakv.runtime.streams import ignoring_captures, own_stream
from portakv.view import KVView
from portakv.view.form import Form
from portakv.view.index import index_of
from portakv.view.view import dense_blocks

#: Rows are packed if that makes their link at least so many times as fast.
GAIN = 1.05
#: The backend that packs where no other does, by plain torch operations.
REFERENCE = "reference"
#: Space for escapes in a slot of chosen size, in parts of the most escapes in the sample. A block
#: is raw if one of its planes does not fit, and it has more planes than a sample can prove.
SPARE = 1.125
#: Raw bytes of rows after which another sample is taken. They cross a link of 55 GB/s in 156 ms,
#: next to which a sample of a few MiB is short (not measured on a GPU).
SAMPLE_AGAIN = 8 << 30
#: The least number of packed blocks that can show a sample to be out of date, and the part of them,
#: one in so many, above which it is because they did not fit.
LOOK_AT = 64
MISFITS = 8
#: A sample has at most so many blocks, and of large blocks at most so many bytes.
BLOCKS = 8
BYTES = 8 << 20
#: Values that are counted together, which bounds the temporary memory to some 30 MiB.
TOGETHER = 1 << 20
#: Raw bytes of a copy that is measured: what a task of a block store copies.
MEASURED = 16 << 20
#: Copies that are timed, unless they take longer than `SECONDS` together.
ROUNDS = 5
SECONDS = 0.1
#: The escapes of the planes of each kv, int64 ``[blocks, planes]``.
Counts = tuple[npt.NDArray[np.int64], ...]


def is_out_of_date(packed: int, misfits: int) -> bool | None:
    """Return whether a sample is out of date, since so many of the blocks that were packed after it
    did not fit. None: too few blocks to tell."""
    return None if packed < LOOK_AT else misfits * MISFITS > packed


@dataclass(frozen=True, slots=True)
class EncodingChoice:
    """The answer of `choose_encoding`, with its figures.

    Attributes:
        pack: the parameters, for the ``encoding`` of a form; None: leave the rows raw.
        why: the reason, as a sentence.
        link_gbps: 10^9 bytes a second over the link. None: not looked at.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most.
        ratio: bytes of raw rows for each byte over the link, with blocks that do not fit.
        escapes: the mean share of escapes among the values of the sample.
        fits: the share of blocks of the sample that fit.
    """

    pack: Pack | None
    why: str
    link_gbps: float | None = None
    packing_gbps: float | None = None
    ratio: float | None = None
    escapes: float | None = None
    fits: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return the choice and its figures, as JSON takes them."""
        figures = asdict(self)
        del figures["pack"]
        return {"encoding": "raw" if self.pack is None else self.pack.text, **figures}


class Sampled(NamedTuple):
    """The result of a sample for some parameters; the figures are those of `EncodingChoice`."""

    pack: Pack
    ratio: float
    escapes: float
    fits: float


def choose_encoding(
    view: KVView,
    blocks: Ids | None,
    *,
    pack: Pack | None = None,
    link_gbps: float | None = None,
    packing_gbps: float | None = None,
) -> EncodingChoice:
    """Return whether blocks of a view should be packed for a link, and the parameters.

    The rows stay raw where `reference` packs, such as on a CPU, as packing is slower there than a
    copy, unless ``packing_gbps`` is declared. Waits for the device, and measures rates at the first
    call for a device.

    Args:
        view: a paged view.
        blocks: numbers of blocks, of which a few at equal distances are counted; an `Index` has
            them in blocks of the view. None: all blocks.
        pack: the parameters to judge. None: those with the smallest slot for the blocks.
        link_gbps: 10^9 bytes a second of the link that the rows cross. None: that of the link
            between the device and the host, measured; rows of a CPU stay raw.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most. None:
            measured, over the link between the device and the host.

    Raises:
        InvalidTerms: wrong arguments. SlotError: blocks that the view lacks.
    """
    check_terms(pack, link_gbps, packing_gbps)
    instance("view", view, KVView, "Make one of the tensors and their layout.")
    if view.block_size is None:
        raise InvalidTerms("Expected view to be a paged view, got a chunk. Name a block axis.")
    size = view.block_size
    index = index_of(blocks, size)
    count = view.slots // size
    whole = index.ids is None
    if index.offset or not (whole or index.step == size):
        raise SlotError(
            f"Expected blocks to be an index of blocks of {size} tokens, got {index!r}. Pass "
            f"Index(numbers, {size}), or the numbers alone."
        )
    ids = np.arange(count) if whole else index.host_ids()
    if not len(ids):
        raise SlotError("Expected blocks to be numbers of blocks, got none. Pass at least one.")
    # Whether or not the sample has them.
    for wrong in ids[(ids < 0) | (ids >= count)][:1]:
        raise SlotError(
            f"Expected blocks to be numbers from 0 to {count - 1}, which the view has, got "
            f"{wrong}. Correct it."
        )
    why = stays_raw(view, pack, packing_gbps)
    if why:
        return EncodingChoice(None, why)
    rated = rated_choice(view, pack, link_gbps, packing_gbps)
    if rated.pack is None:
        return rated
    return judged(rated, best_of(view, Sample(view, ids, packs_of(pack)), pack))


def check_terms(pack: Any, link_gbps: Any, packing_gbps: Any) -> None:
    """Raise `InvalidTerms` for wrong parameters or rates."""
    if pack is not None:
        instance("pack", pack, Pack, "Pass Pack(), or None.")
    if link_gbps is not None:
        rate("link_gbps", link_gbps)
    if packing_gbps is not None:
        rate("packing_gbps", packing_gbps)


def packs_of(pack: Pack | None) -> tuple[Pack, ...]:
    """Return the parameters that a sample counts for."""
    return tuple(map(Pack, CODE_BITS)) if pack is None else (pack,)


def stays_raw(view: KVView, pack: Pack | None, packing_gbps: float | None) -> str:
    """Return why rows of a view stay raw whatever their values, as a sentence; empty if they need
    not."""
    form = view.form
    if form.encoding:
        return "The blocks are packed already, and are copied as they are."
    if form.opaque:
        return f"The blocks are opaque pages; packing takes rows of {PACKED_DTYPE}."
    others = [dtype for dtype in form.dtypes or ("uint8",) if dtype != PACKED_DTYPE]
    if others:
        return (
            f"The rows are {others[0]}; packing takes {PACKED_DTYPE}, and saves little of others."
        )
    try:
        for each in packs_of(pack):
            for width in form.widths:
                each.plane(form.block_size * width // 2)
    except Unsupported as error:
        return str(error)
    device = view.device
    if packing_gbps is not None:
        return ""
    if device.type == "cpu":
        return "The rows are on the CPU, which packs far slower than it copies."
    choice = choose(device, None)
    if choice.name != REFERENCE and PACK in choice.can.encodings:
        return ""
    return f"{REFERENCE} packs on {device}, far slower than the device copies."


def rated_choice(
    view: KVView,
    pack: Pack | None,
    link_gbps: float | None,
    packing_gbps: float | None,
    most_gbps: float = inf,
) -> EncodingChoice:
    """Return the choice by the rates, for blocks that all fit.

    Missing rates are measured. ``most_gbps``: the most of a link that follows the measured one. A
    CPU has no link to measure: it is ``most_gbps``, and without a limit the rows stay raw.
    """
    link = link_gbps
    packing = packing_gbps
    if link is None and view.device.type == "cpu":  # there is nothing to measure
        if most_gbps == inf:
            why = "Rows of a CPU cross no link that can be measured: declare link_gbps."
            return EncodingChoice(None, why)
        link = most_gbps
    if link is None or packing is None:
        try:
            rates = rates_of(view, pack or Pack())
        except (PortaKVError, RuntimeError) as error:
            return EncodingChoice(None, f"The rates could not be measured: {error}")
        link = min(rates.link, most_gbps) if link is None else link
        packing = rates.packing if packing is None else packing
    best = max(_raw_bytes(view) / _slot_bytes(view, each) for each in packs_of(pack))
    choice = EncodingChoice(pack or Pack(), "", link, packing, best)
    return _weighed(choice, "of the slots")


def judged(rated: EncodingChoice, sampled: Sampled) -> EncodingChoice:
    """Return the choice by the rates of one and by a sample."""
    pack, ratio, escapes, fits = sampled
    choice = replace(rated, pack=pack, ratio=ratio, escapes=escapes, fits=fits)
    return _weighed(choice, "of the sample")


def _weighed(choice: EncodingChoice, which: str) -> EncodingChoice:
    """Return a choice with the reason, without parameters if packing does not pay.

    ``which``: the source of the ratio, as a phrase.
    """
    assert choice.link_gbps is not None
    assert choice.packing_gbps is not None
    assert choice.ratio is not None
    packed = min(choice.packing_gbps, choice.ratio * choice.link_gbps)
    pays = packed >= GAIN * choice.link_gbps
    why = (
        f"Packing {'pays' if pays else 'does not pay'}: {packed:.3g} GB/s of rows packed and "
        f"{choice.link_gbps:.3g} raw, with a ratio {which} of {choice.ratio:.3f}."
    )
    if choice.fits is not None and choice.fits < 1:
        why += f" Of the sample {choice.fits:.0%} of the blocks fit."
    return replace(choice, why=why, pack=choice.pack if pays else None)


def best_of(view: KVView, sample: Sample, pack: Pack | None) -> Sampled:
    """Return the parameters for the planes of a sample, or how those of ``pack`` do."""
    if pack is not None:
        return _result(view, pack, sample.counts(pack))
    results = []
    for usual in packs_of(None):
        counts = sample.counts(usual)
        results += [_result(view, each, counts) for each in _candidates(view, usual, counts)]
    # Of equal ratios the wider codes, which are packed faster.
    return max(results, key=lambda one: (one.ratio, one.pack.code_bits))


def _candidates(view: KVView, usual: Pack, counts: Counts) -> list[Pack]:
    """Return the usual slot, and the smallest slot that holds the planes of a sample.

    One size serves all kv, so that it is chosen only if they have equal widths.
    """
    values = {_values(view, kv) for kv in range(view.kv)}
    if len(values) > 1:
        return [usual]
    most = max(int(each.max()) for each in counts)
    size = slot_for(values.pop(), usual.code_bits, round(SPARE * most))
    known = usual.plane(_values(view, 0)).slot_bytes
    return [usual] if size == known else [usual, Pack(usual.code_bits, size)]


def _result(view: KVView, pack: Pack, counts: Counts) -> Sampled:
    """Return how planes with so many escapes are packed."""
    blocks = len(counts[0])
    fit = np.ones(blocks, np.bool_)
    escapes = 0
    values = 0
    for kv, each in enumerate(counts):
        plane = pack.plane(_values(view, kv))
        fit &= (each <= plane.most_escapes).all(1)
        escapes += int(each.sum())
        values += each.size * plane.values
    fits = float(fit.mean())
    # A block that does not fit crosses packed at first, and then raw.
    raw = _raw_bytes(view)
    wire = _slot_bytes(view, pack) + (1 - fits) * raw
    return Sampled(pack, raw / wire, escapes / values, fits)


def _values(view: KVView, kv: int) -> int:
    """Return the values of a plane."""
    return view.form.block_size * view.form.widths[kv] // 2


def _raw_bytes(view: KVView) -> int:
    """Return the raw bytes of one plane of each kv."""
    return sum(2 * _values(view, kv) for kv in range(view.kv))


def _slot_bytes(view: KVView, pack: Pack) -> int:
    """Return the bytes of one slot of each kv."""
    return sum(pack.plane(_values(view, kv)).slot_bytes for kv in range(view.kv))


# --- Samples --------------------------------------------------------------------------------------


class Sample:
    """The escapes of a few blocks of a view, for several parameters.

    Args:
        view: a paged view of bf16 rows.
        ids: numbers of blocks, of which at most `BLOCKS` at equal distances are counted.
        packs: the parameters.

    Attributes:
        blocks: the number of blocks that are counted.
    """

    def __init__(self, view: KVView, ids: npt.NDArray[np.int64], packs: Sequence[Pack]) -> None:
        size = view.block_size
        assert size is not None
        self.blocks = max(1, min(BLOCKS, len(ids), BYTES // (size * view.form.token_bytes)))
        at = np.linspace(0, len(ids) - 1, self.blocks).round().astype(np.int64)
        device = view.device
        quiet = ignoring_captures(device)  # of other threads
        with torch.inference_mode(False), torch.no_grad(), quiet:
            stage = dense_blocks(view.form, size, self.blocks, device)
            copy_blocks(view, stage, ids[at], np.arange(self.blocks))
            there = torch.cat([self._counts(stage, size, pack) for pack in packs])
            self._end: torch.Event | None = None
            self._host = to_host(there)
            if device.type != "cpu":
                self._end = torch.Event(device)
                self._end.record(torch.accelerator.current_stream(device.index))
        self._device = device
        self._packs = [*packs]
        self._kv = view.kv

    @property
    def ready(self) -> bool:
        """Return True if the counts are complete."""
        if self._end is None:
            return True
        with ignoring_captures(self._device):
            return self._end.query()

    def counts(self, pack: Pack) -> Counts:
        """Return the escapes with parameters of the sample; wait for them."""
        if self._end is not None:
            with ignoring_captures(self._device):
                self._end.synchronize()
        each = self._host.numpy().reshape(len(self._packs), self._kv, self.blocks, -1)
        return tuple(each[self._packs.index(pack)])

    def _counts(self, stage: KVView, size: int, pack: Pack) -> torch.Tensor:
        """Return the escapes of all kv, one after the other."""
        made = []
        for planes, width in zip(stage.tensors, stage.widths, strict=True):
            plane = pack.plane(size * width // 2)
            bits = planes.view(-1, plane.values).view(torch.int16)
            made += [escapes_of(x, plane) for x in bits.split(max(1, TOGETHER // plane.values))]
        return torch.cat(made)


# --- Rates ----------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """10^9 bytes of raw rows a second, the mean of both directions.

    Attributes:
        link: of raw copies between the device and the host.
        packing: of copies that pack or unpack on the device and cross the same link.
    """

    link: float
    packing: float


def rates_of(view: KVView, pack: Pack, nbytes: int = MEASURED) -> Rates:
    """Return the rates for blocks like those of a view on a device, measured at the first call.

    The first call makes up to 24 copies of ``nbytes``, and compiles kernels if need be. It uses a
    private stream, ``nbytes`` of the device twice, and as much pinned memory. Two first calls may
    measure at the same time, and all calls get the same rates.

    Raises:
        PortaKVError: the device cannot make such a copy, or has no memory for it.
    """
    form = view.form
    size = form.block_size
    planes = tuple(pack.plane(size * width // 2) for width in form.widths)
    device = view.device
    subject = (planes, size, form.layers, form.heads, nbytes)
    return costs.measured(device, subject, lambda: measure(form, size, pack, device, nbytes))


def measure(form: Form, size: int, pack: Pack, device: torch.device, nbytes: int) -> Rates:
    """Measure copies of blocks of a form's extents in both directions."""
    blocks = max(1, nbytes // (size * form.token_bytes))
    stream = own_stream(device)
    quiet = ignoring_captures(device)  # of other threads
    with torch.inference_mode(False), torch.no_grad(), quiet, inside(stream):
        rows = dense_blocks(form, size, blocks, device)
        _fill(rows)
        raw = dense_blocks(form, size, blocks, device, allocate=_pinned)
        packed = dense_blocks(form, size, blocks, device, pack, _pinned)
        payload = blocks * size * form.token_bytes
        ids = torch.arange(blocks, dtype=torch.int64, device="cpu")

        def seconds(host: KVView) -> float:
            """Return the seconds of both directions."""
            out = _wall(lambda: copy_blocks(rows, host, ids, ids).synchronize())
            back = _wall(lambda: copy_blocks(host, rows, ids, ids).synchronize())
            return out + back

        return Rates(2 * payload / seconds(raw) / 1e9, 2 * payload / seconds(packed) / 1e9)


def _wall(call: Callable[[], object]) -> float:
    """Return the median of the seconds of a call by the wall, after one that does not count."""
    call()
    times = list[float]()
    while len(times) < ROUNDS and sum(times) < SECONDS:
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return median(times)


def _fill(rows: KVView) -> None:
    """Fill rows with normal values, which fit into packed slots. Leaves torch's own random numbers
    as they are."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for tensor in rows.tensors:
        shape = tensor.shape
        tensor.copy_(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))


def _pinned(nbytes: int) -> torch.Tensor:
    """Return pinned memory of the host."""
    return pinned.allocate(nbytes, fallback=True).tensor
