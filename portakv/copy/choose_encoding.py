# SPDX-License-Identifier: Apache-2.0
"""Choose whether rows are packed before they cross a link: by the rates of the link and of packing,
and by the escapes of a sample of real blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import instance, rate
from portakv.copy.exponents import Counts, Sample
from portakv.copy.pack_rates import rates_of
from portakv.copy.request import Ids
from portakv.errors import InvalidTerms, PortaKVError, SlotError, Unsupported
from portakv.layout.encodings import CODE_BITS, PACK, PACKED_DTYPE, Pack, slot_for
from portakv.registry import choose
from portakv.view import KVView
from portakv.view.index import index_of

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
        return {
            "encoding": "raw" if self.pack is None else self.pack.text,
            "why": self.why,
            "link_gbps": self.link_gbps,
            "packing_gbps": self.packing_gbps,
            "ratio": self.ratio,
            "escapes": self.escapes,
            "fits": self.fits,
        }


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
    ids = _numbers_of(blocks, view, view.block_size)
    why = stays_raw(view, pack, packing_gbps)
    if why:
        return EncodingChoice(None, why)
    rated = rated_choice(view, pack, link_gbps, packing_gbps)
    if rated.pack is None:
        return rated
    return judged(rated, best_of(view, Sample(view, ids, packs_of(pack)), pack))


def _numbers_of(blocks: Ids | None, view: KVView, size: int) -> npt.NDArray[np.int64]:
    """Return numbers of blocks of ``size`` tokens; None is all blocks of a view.

    Raises `SlotError` for none, for an index of other blocks, and for numbers that the view lacks,
    whether or not a sample has them.
    """
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
    _check_blocks(ids, count)
    return ids


def _check_blocks(ids: npt.NDArray[np.int64], blocks: int) -> None:
    """Raise `SlotError` for numbers that are not those of so many blocks."""
    for wrong in ids[(ids < 0) | (ids >= blocks)][:1]:
        raise SlotError(
            f"Expected blocks to be numbers from 0 to {blocks - 1}, which the view has, got "
            f"{wrong}. Correct it."
        )


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
    return "" if packing_gbps is not None else _no_packer(view.device)


def _no_packer(device: torch.device) -> str:
    """Return why a device does not pack at the rate of a copy, as a sentence; empty if a backend of
    it packs."""
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
    most_gbps: float = float("inf"),
) -> EncodingChoice:
    """Return the choice by the rates, for blocks that all fit.

    Missing rates are measured. ``most_gbps``: the most of a link that follows the measured one. A
    CPU has no link to measure: it is ``most_gbps``, and without a limit the rows stay raw.
    """
    link = link_gbps
    packing = packing_gbps
    if link is None and view.device.type == "cpu":  # there is nothing to measure
        if most_gbps == float("inf"):
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
