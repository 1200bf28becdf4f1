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
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv import __version__
from portakv.errors import InvalidTerms
from portakv.runtime.word_sums import MODULUS
from portakv.view import KVView
from portakv.witness.faults import Difference, Fault, Name, as_json, ranges_text
from portakv.witness.fingerprint import Fingerprints, Geometry, Sums, keys_for, sums_of_rows
from portakv.witness.table import MAGIC, geometry_of, is_whole, read_file

_FORMAT = 1
_SHOWN = 16  # planes


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

    def replay(self) -> str:
        """Return ``same`` if the rows in the file have the actual sums; ``late`` if they have the
        expected ones, so that the load had not ended; ``none`` without rows; else ``changed``."""
        if not self.layers:
            return "none"
        part = replace(self.geometry, layers=len(self.layers))
        sums = sums_of_rows(part, self.rows, keys_for(part, torch.device("cpu")))[0].numpy()
        if np.array_equal(sums, self._sums_of_layers(self.actual)):
            return "same"
        late = np.array_equal(sums, self._sums_of_layers(self.expected))
        return "late" if late else "changed"

    def _sums_of_layers(self, sums: Sums) -> Sums:
        """Return the sums of the layers that the file has."""
        geometry = self.geometry
        layers = [*self.layers]
        by_head = geometry.by_head(sums)[layers].ravel()
        return np.concatenate([by_head, geometry.by_segment(sums)[layers].ravel()])


#: The outcomes of a replay in words.
_REPLAYS = {
    "same": "the rows in this file have the actual sums",
    "late": "the rows were right when they were read again: the load had not ended",
    "changed": "the rows changed after the comparison",
    "none": "this file has no rows: a layer is too large",
}


def new_file(folder: Path, stem: str) -> Path:
    """Return a new and empty file, whose name no other rank takes meanwhile. Raises OSError."""
    for nth in count(1):
        path = folder / (f"{stem}.zip" if nth == 1 else f"{stem}-{nth}.zip")
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError(stem)


def write_report(
    path: Path,
    fault: Fault,
    name: Name,
    difference: Difference,
    fingerprints: Fingerprints,
    view: KVView,
    about: Mapping[str, str],
    most: int,
) -> None:
    """Write a file about a fault, with at most so many bytes of rows. Blocks the host.

    Raises OSError.
    """
    geometry = difference.geometry
    layers = list(range(geometry.layers))
    if geometry.block_bytes > most:
        each = geometry.block_bytes // geometry.layers
        layers = [*difference.layers][: most // each]
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
        "arrays": {
            "expected, actual": "sums [layers, kv, heads], then sums [layers, kv, segments]",
            "rows of a kv": "uint8 [layers, rows of a head, bytes of all heads]",
        },
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


def _lines_of(report: Report, replay: str) -> list[str]:
    """Return a fault as lines of text."""
    fault = report.text["fault"]
    geometry = report.geometry
    difference = Difference(geometry, report.expected, report.actual)
    differing = int(difference.planes.sum())
    lines = [
        fault["sentence"],
        "",
        f"kind      {fault['kind']}",
        f"group     {fault['group'] or '(one group)'}",
        f"key       {fault['key']}",
        f"block     {fault['block']}",
        f"view      {report.text['view']}",
        f"versions  {', '.join(f'{k} {v}' for k, v in report.text['versions'].items())}",
        f"planes    {differing} of {geometry.layers * geometry.kv} differ",
        f"replay    {_REPLAYS[replay]}",
        "",
        "layer  kv  heads         segments      expected -> actual",
    ]
    expected = geometry.by_head(report.expected)
    actual = geometry.by_head(report.actual)
    for layer, kv in np.argwhere(difference.planes)[:_SHOWN].tolist():
        heads = np.flatnonzero(difference.heads[layer, kv]).tolist()
        segments = np.flatnonzero(difference.segments[layer, kv]).tolist()
        place = layer, kv, heads[0] if heads else 0
        sums = [f"{int(x[place]) % MODULUS:016x}" for x in (expected, actual)]
        lines.append(
            f"{layer:5}  {kv:2}  {ranges_text(heads):12}  {ranges_text(segments):12}  "
            f"{sums[0]} -> {sums[1]}"
        )
    if differing > _SHOWN:
        lines.append(f"... and {differing - _SHOWN} more planes")
    return lines


def _groups_of(path: Path) -> list[dict[str, Any]]:
    """Return the groups of a file of fingerprints, as values for JSON."""
    groups = list[dict[str, Any]]()
    for name, ring in read_file(path).items():
        geometry = ring.geometry
        (heads, sums) = ring.records
        used = np.flatnonzero(heads["length"])
        whole = sum(is_whole(heads[slot], sums[slot]) for slot in used)
        groups.append(
            {
                "group": name,
                "fingerprints": whole,
                "torn": len(used) - whole,
                "most": len(heads),
                "bytes": geometry.nbytes,
                "bytes of a block": geometry.block_bytes,
                "layers": geometry.layers,
                "kv": geometry.kv,
                "heads": geometry.heads,
            }
        )
    return groups


def show(path: Path) -> tuple[list[str], bool]:
    """Return a file of a witness as lines of text, and whether nothing in it contradicts itself.

    A file about a fault is replayed: its rows are summed again. A file of fingerprints may have
    torn records.

    Raises:
        InvalidTerms: the file is torn or another file.
        OSError: it cannot be read.
    """
    if not _is_table(path):
        report = read_report(path)
        replay = report.replay()
        return _lines_of(report, replay), replay != "changed"
    groups = _groups_of(path)
    lines = [
        f"{x['group'] or '(one group)'}: {x['fingerprints']} of {x['most']} fingerprints, "
        f"{x['torn']} torn; {x['bytes']} B for a block of {x['bytes of a block']} B, {x['layers']} "
        f"layers, {x['kv']} kv, {x['heads']} heads"
        for x in groups
    ]
    return lines, not any(x["torn"] for x in groups)


def as_values(path: Path) -> tuple[dict[str, Any], bool]:
    """Return what `show` does, as values for JSON."""
    if not _is_table(path):
        report = read_report(path)
        replay = report.replay()
        return {**report.text, "replay": replay}, replay != "changed"
    groups = _groups_of(path)
    return {"groups": groups}, not any(x["torn"] for x in groups)


def _is_table(path: Path) -> bool:
    """Return whether a file begins as a table of fingerprints does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
