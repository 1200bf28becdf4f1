# SPDX-License-Identifier: Apache-2.0
"""`encoding="auto"`: a store has the packed and the raw form of its blocks, and chooses one of them
for each save.

A choice is made by `portakv.copy.choose_encoding`, and remembered for each device. A new sample is
taken after `SAMPLE_AGAIN` bytes of saves, or if many blocks did not fit. Only the first one is
waited for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import invalid
from portakv.copy.choose_encoding import (
    SAMPLE_AGAIN,
    EncodingChoice,
    best_of,
    check_terms,
    judged,
    rated_choice,
    stays_raw,
)
from portakv.copy.exponents import Sample
from portakv.errors import InvalidTerms, PortaKVError, Unsupported
from portakv.graph import Graph
from portakv.layout.encodings import Pack
from portakv.storage.encoded import EncodedFigures
from portakv.storage.form import BlockForm
from portakv.view import KVView

#: The most of a disk or an object store that is believed, unless its rate is declared: a drive with
#: four lanes of PCIe 4.0.
TIER_GBPS = 7.0
#: The names of the two forms of such a store.
PACKED = "packed"
RAW = "raw"


@dataclass(frozen=True, slots=True)
class AutoEncoding:
    """Terms of a store that packs blocks where it pays; ``encoding="auto"`` has the usual ones.

    Attributes:
        pack: the parameters of packed blocks; `portakv.choose_encoding` chooses them by a sample.
            None: those of the form of the store if that is packed, else the usual ones.
        link_gbps: 10^9 bytes a second of the slowest link that blocks cross. None: that of the link
            between the device and the host, measured, and at most 7 if the store has tiers. Rows
            of a CPU have 7 with tiers, and stay raw without.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most. None:
            measured, over the link between the device and the host; where `reference` packs, such
            as on a CPU, rows stay raw.

    Raises:
        InvalidTerms: a value that a term cannot have.
    """

    pack: Pack | None = None
    link_gbps: float | None = None
    packing_gbps: float | None = None

    def __post_init__(self) -> None:
        check_terms(self.pack, self.link_gbps, self.packing_gbps)


#: What a store takes as its encoding; None: blocks are stored as their forms say.
Encoding: TypeAlias = Literal["auto"] | AutoEncoding | None


def terms_of(encoding: object) -> AutoEncoding | None:
    """Return the terms of an encoding; None without one. Raises `InvalidTerms` for anything
    else."""
    if encoding is None or isinstance(encoding, AutoEncoding):
        return encoding
    if isinstance(encoding, str) and encoding == "auto":
        return AutoEncoding()
    do = "Pass one of these; a packed form is made by BlockForm.of(encoding=...)."
    raise invalid("encoding", "'auto', an AutoEncoding or None", encoding, do)


def forms_for(form: BlockForm, terms: AutoEncoding) -> tuple[dict[str, BlockForm], str]:
    """Return the forms of a store that chooses, by their names, and why it has only the raw one, as
    a sentence. Raises `InvalidTerms` for a lossy form."""
    if form.lossy:
        got = f"one in {form.encoding!r}"
        raise InvalidTerms(
            f"Expected form to be one of raw or packed blocks with encoding='auto', got {got}, "
            f"which does not keep every bit. Leave encoding out, or pass the raw form."
        )
    pack = terms.pack
    if pack is None:
        pack = Pack.of_text(form.encoding) if form.encoding else Pack()
    raw = form.raw
    try:
        return {PACKED: raw.packed(pack), RAW: raw}, ""
    except Unsupported as error:
        return {RAW: raw}, str(error)


class Known:
    """The choice for a device.

    Attributes:
        choice: the present choice.
        rated: the choice by the rates; None: no sample changes the choice.
        rates_missing: the rates could not be measured, and are measured again.
        left: raw bytes of saves until the next sample, or the next rates.
        pending: a sample whose result has not been looked at.
        trouble: the reason why the latest sample was not taken, as a sentence; empty if it was.
    """

    def __init__(
        self,
        choice: EncodingChoice,
        rated: EncodingChoice | None = None,
        rates_missing: bool = False,
    ) -> None:
        self.choice = choice
        self.rated = rated
        self.rates_missing = rates_missing
        self.left = SAMPLE_AGAIN
        self.pending: Sample | None = None
        self.trouble = ""


class Chooser:
    """Chooses for the saves of a store, and remembers the choices.

    Args:
        form: the packed form; None: the store has only the raw one.
        why: then, the reason, as a sentence.
        terms: the terms of the store.
        tiers: the store has tiers besides the host's memory.
        figures: counts the blocks of both forms.
        graph: its trace gets each new choice with its figures.

    Attributes:
        known: the choice for each device.
    """

    def __init__(
        self,
        form: BlockForm | None,
        why: str,
        terms: AutoEncoding,
        tiers: bool,
        figures: EncodedFigures,
        graph: Graph,
    ) -> None:
        self._terms = terms
        self._form = form
        self._pack = None if form is None else Pack.of_text(form.encoding)
        self._why = why
        self._most = TIER_GBPS if tiers else float("inf")
        self._figures = figures
        self._graph = graph
        self._lock = threading.Lock()
        self.known: dict[torch.device, Known] = {}

    def packs(self, view: KVView, ids: npt.NDArray[np.int64]) -> bool:
        """Return True if blocks of a view are to be packed.

        ``ids``: the numbers of the view's blocks, whose rows are ready on the current stream.
        """
        form = self._form
        if form is None:
            self._note_once(view.device)
            return False
        if view.form.encoding:
            return True
        if view.block_size != form.block_size or not len(ids):
            return False
        with self._lock:
            known = self.known.get(view.device)
            if known is None or (known.rates_missing and known.left <= 0):
                known = self.known[view.device] = self._begin(view, ids)
                self._note(known.choice)
            elif known.rated is not None:
                self._again(known, known.rated, view, ids)
            known.left -= len(ids) * form.raw.payload_bytes
            return known.choice.pack is not None

    def _note(self, choice: EncodingChoice) -> None:
        """Note a choice in the trace."""
        self._graph.trace.note("encoding", self._graph.clock(), choice.figures())

    def lines(self) -> list[str]:
        """Return the choice for each device, with the reason, a line each."""
        with self._lock:
            known = {device: (each.choice, each.trouble) for device, each in self.known.items()}
        lines = list[str]()
        for device, (choice, trouble) in known.items():
            which = "raw" if choice.pack is None else "packed"
            lines.append(f"Saves from {device} are {which}. {choice.why} {trouble}".rstrip())
        return lines or ["No save has chosen between packed and raw blocks yet."]

    def _note_once(self, device: torch.device) -> None:
        """Note that rows of a device stay raw, as the store has only the raw form."""
        with self._lock:
            if device not in self.known:
                known = self.known[device] = Known(EncodingChoice(None, self._why))
                self._note(known.choice)

    def _begin(self, view: KVView, ids: npt.NDArray[np.int64]) -> Known:
        """Return the first choice for a device; wait for its sample."""
        terms = self._terms
        pack = self._pack
        assert pack is not None
        why = stays_raw(view, pack, terms.packing_gbps)
        if why:
            return Known(EncodingChoice(None, why))
        rated = rated_choice(view, pack, terms.link_gbps, terms.packing_gbps, self._most)
        if rated.pack is None:
            return Known(rated, rates_missing=rated.packing_gbps is None)
        self._figures.forget_misfits(view.device)
        try:
            best = best_of(view, Sample(view, ids, (pack,)), pack)
        except torch.OutOfMemoryError:
            why = f"No sample was taken, as {view.device} had no memory left for it."
            return Known(EncodingChoice(None, why), rated)
        except (PortaKVError, RuntimeError) as error:  # such as a lack of pinned memory
            return Known(EncodingChoice(None, f"No sample was taken: {error}"), rated)
        return Known(judged(rated, best), rated)

    def _again(
        self, known: Known, rated: EncodingChoice, view: KVView, ids: npt.NDArray[np.int64]
    ) -> None:
        """Look at a sample that is complete, or take the next one if it is time."""
        pack = self._pack
        assert pack is not None
        if known.pending is not None:
            if not known.pending.ready:
                return
            choice = judged(rated, best_of(view, known.pending, pack))
            known.pending = None
            known.trouble = ""
            if (choice.pack is None) != (known.choice.pack is None):
                self._note(choice)
            known.choice = choice
        elif known.left <= 0 or self._figures.sample_is_out_of_date(view.device):
            known.left = SAMPLE_AGAIN
            self._figures.forget_misfits(view.device)
            try:
                known.pending = Sample(view, ids, (pack,))
            except (PortaKVError, RuntimeError) as error:  # the choice stays
                known.trouble = f"The next sample was not taken: {error}"
                self._note(replace(known.choice, why=known.trouble))
