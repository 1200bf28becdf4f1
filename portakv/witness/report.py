# SPDX-License-Identifier: Apache-2.0
"""Files about faults, which a maintainer of another project reads and replays.

A file is a zip: ``fault.json``, the sums as ``expected.npy`` and ``actual.npy``, those that explain
the fault as ``explained.npy``, and the restored rows of each kv as ``rows0.npy``, uint8
``[layers, tokens, heads * width]``. Any zip program and numpy read it.
"""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv import __version__
from portakv.errors import InvalidTerms
from portakv.view import KVView
from portakv.witness.faults import Difference, Fault, Name, as_json, ranges_text
from portakv.witness.fingerprint import Fingerprints, Geometry, Sums, keys_for, sums_of_rows
from portakv.witness.table import geometry_of, head_text, is_whole, read_records

_FORMAT = 1
#: The most bytes of rows in a file.
ROWS = 64 << 20


class Report(NamedTuple):
    """The contents of a file about a fault.

    Attributes:
        text: ``fault.json``.
        geometry: of the sums.
        expected, actual: fingerprints.
        layers: whose rows the file has.
        rows: for each kv the rows of these layers.
    """

    text: dict[str, Any]
    geometry: Geometry
    expected: Sums
    actual: Sums
    layers: Sequence[int]
    rows: Sequence[torch.Tensor]

    @property
    def is_replayed(self) -> bool:
        """Return whether the rows in the file have the actual sums."""
        return bool(self.rows) and bool(
            np.array_equal(self._sums_of_layers(self._rows_sums()), self._of(self.actual))
        )

    @property
    def has_expected_rows(self) -> bool:
        """Return whether the rows in the file have the expected sums."""
        return bool(self.rows) and bool(
            np.array_equal(self._sums_of_layers(self._rows_sums()), self._of(self.expected))
        )

    def _rows_sums(self) -> Sums:
        part = self._part()
        sums = sums_of_rows(part, self.rows, keys_for(part, torch.device("cpu")))
        return sums[0].numpy()

    def _part(self) -> Geometry:
        fields = asdict(self.geometry)
        return geometry_of({**fields, "layers": len(self.layers)})

    def _sums_of_layers(self, sums: Sums) -> Sums:
        part = self._part()
        return np.concatenate([part.by_head(sums).ravel(), part.by_segment(sums).ravel()])

    def _of(self, sums: Sums) -> Sums:
        geometry = self.geometry
        layers = [*self.layers]
        by_head = geometry.by_head(sums)[layers].ravel()
        return np.concatenate([by_head, geometry.by_segment(sums)[layers].ravel()])


def write_report(
    path: Path,
    fault: Fault,
    name: Name,
    difference: Difference,
    fingerprints: Fingerprints,
    view: KVView,
    about: Mapping[str, str],
) -> None:
    """Write a file about a fault. Blocks the host, to read the rows.

    Raises OSError.
    """
    geometry = difference.geometry
    layers = list(range(geometry.layers))
    if geometry.block_bytes > ROWS:
        each = geometry.block_bytes // geometry.layers
        layers = [*difference.layers][: ROWS // each]
    rows = [tensor[layers].cpu().contiguous() for tensor in fingerprints.rows(fault.block)]
    text = {
        "format": _FORMAT,
        "fault": as_json(fault),
        "versions": {
            "portakv": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **about,
        },
        "view": repr(view),
        "layout": view.layout.text,
        "geometry": asdict(geometry),
        "rows of layers": layers,
    }
    arrays = {"expected": difference.expected, "actual": difference.actual}
    if name.sums is not None:
        arrays["explained"] = name.sums
    arrays |= {f"rows{kv}": tensor.numpy() for kv, tensor in enumerate(rows)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("fault.json", json.dumps(text, indent=1))
        for entry, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{entry}.npy", buffer.getvalue())


def read_report(path: Path) -> Report:
    """Return the contents of a file about a fault.

    Raises:
        InvalidTerms: the file is torn or another file.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            text = json.loads(file.read("fault.json"))
            if text["format"] != _FORMAT:
                raise ValueError(f"its format is {text['format']}")
            arrays = {
                name.removesuffix(".npy"): np.load(io.BytesIO(file.read(name)), allow_pickle=False)
                for name in file.namelist()
                if name.endswith(".npy")
            }
        geometry = geometry_of(text["geometry"])
        rows = [torch.from_numpy(arrays[f"rows{kv}"]) for kv in range(geometry.kv)]
        layers = text["rows of layers"]
        return Report(
            text, geometry, arrays["expected"], arrays["actual"], layers, rows if layers else []
        )
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise InvalidTerms(
            f"Expected a file about a fault, got {path}: {error}. Pass a file that a witness wrote "
            f"into its reports folder."
        ) from error


def show_report(path: Path) -> list[str]:
    """Return a file about a fault as lines of text. Raises as `read_report`."""
    report = read_report(path)
    fault = report.text["fault"]
    geometry = report.geometry
    difference = Difference(geometry, report.expected, report.actual)
    sums = geometry.layers * geometry.kv
    lines = [
        fault["sentence"],
        "",
        f"kind        {fault['kind']}",
        f"group       {fault['group'] or '(one group)'}",
        f"key         {fault['key']}",
        f"block       {fault['block']}",
        f"view        {report.text['view']}",
        f"versions    {', '.join(f'{k} {v}' for k, v in report.text['versions'].items())}",
        f"planes      {int(difference.planes.sum())} of {sums} differ",
    ]
    if report.is_replayed:
        held = "the rows in this file have the actual sums"
    elif not report.rows:
        held = "this file has no rows: they are too large"
    elif report.has_expected_rows:
        held = "the rows were right when they were read again: the load had not ended"
    else:
        held = "the rows changed after the comparison"
    lines += [
        f"replay      {held}",
        "",
        "layer  kv  heads         segments      expected -> actual",
    ]
    by_head = [geometry.by_head(x) for x in (report.expected, report.actual)]
    for layer, kv in np.argwhere(difference.planes)[:16].tolist():
        heads = np.flatnonzero(difference.heads[layer, kv]).tolist()
        segments = np.flatnonzero(difference.segments[layer, kv]).tolist()
        pair = [f"{int(x[layer, kv, heads[0] if heads else 0]) % 2**64:016x}" for x in by_head]
        lines.append(
            f"{layer:5}  {kv:2}  {ranges_text(heads):12}  {ranges_text(segments):12}  "
            f"{pair[0]} -> {pair[1]}"
        )
    more = int(difference.planes.sum()) - 16
    if more > 0:
        lines.append(f"... and {more} more planes")
    return lines


def show_table(path: Path) -> list[str]:
    """Return a file of fingerprints as lines of text: the records and the layout of each group.

    Raises:
        InvalidTerms: the file is torn or another file.
        OSError: it cannot be read.
    """
    lines = list[str]()
    for name, (geometry, records) in read_records(path).items():
        used = np.flatnonzero(records.heads["length"])
        whole = sum(is_whole(records.heads[slot], records.sums[slot]) for slot in used)
        torn = f", {len(used) - whole} torn" if whole < len(used) else ""
        lines.append(
            f"{name or '(one group)'}: {whole} of {len(records.heads)} fingerprints{torn}; "
            f"{geometry.nbytes} B for a block of {geometry.block_bytes} B; {geometry.layers} "
            f"layers, {geometry.kv} kv, {geometry.heads} heads"
        )
    return lines


def show(path: Path) -> list[str]:
    """Return a file about a fault, or a file of fingerprints, as lines of text.

    Raises as `show_report` and `show_table`.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return show_report(path)
    try:
        head_text(path, path.open("rb").read(1 << 20))
    except InvalidTerms:
        return show_report(path)
    return show_table(path)
