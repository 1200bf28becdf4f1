# SPDX-License-Identifier: Apache-2.0
"""A failing example as a file: the structure of a case in JSON, rebuilt and judged again.

It holds arrangements, ids and seeds, never bytes, and needs no hypothesis to be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from portakv_conformance.draw.arrangement import Arrangement, Case, Side, side_of
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import ENDS, Judge
from portakv_conformance.judge.subject import Subject
from portakv_conformance.record import JsonObject

SCHEMA = "portakv-example/1"
_KINDS = {"list": list, "tuple": tuple, "dict": dict}


def dump(case: Case, about: JsonObject | None = None) -> str:
    """Return a case as a JSON document; ``about`` says where it came from.

    `ValueError`: a side was not built from an arrangement.
    """
    document = {
        "schema": SCHEMA,
        "about": about or {},
        "count": case.count,
        "one_cache": case.src.tensors is case.dst.tensors,
        "src": _side(case.src),
        "dst": _side(case.dst),
    }
    return json.dumps(document, indent=1) + "\n"


def save(case: Case, path: Path, about: JsonObject | None = None) -> None:
    """Write a case to a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(case, about), encoding="utf-8")


def read_about(text: str) -> JsonObject:
    """Return what a JSON document states about its case.

    Makes no tensors, so it needs no device. Raises `ValueError` if it is not a document of this
    schema.
    """
    with _reading():
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA!r}, got {document['schema']!r}")
        return dict(document["about"])


def load(text: str, device: str | torch.device | None = None) -> tuple[Case, JsonObject]:
    """Return the case of a JSON document, with fresh tensors, and its description.

    Tensors of the judged device are built on ``device``, by default where they lay.
    `ValueError`: the document has another schema, or fields are missing.
    """
    about = read_about(text)

    def to(place: str) -> str:
        """Return the new device of a tensor at ``place``; host memory of a device's case stays."""
        stays = device is None or (place == "cpu" and about.get("device", "cpu") != "cpu")
        return place if stays else str(device)

    with _reading():
        document = json.loads(text)
        src = _build(document["src"], to)
        dst = _build(document["dst"], to, src if document["one_cache"] else None)
        return Case(src, dst, int(document["count"])), about


@contextmanager
def _reading() -> Iterator[None]:
    """Raise `ValueError`, for any failure inside, that the file is not an example."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected a saved example of the suite, got another file ({type(error).__name__}: "
            f"{error}). Pass an example-*.json that a run wrote."
        ) from error


def replay(path: Path, subject: Subject) -> str | None:
    """Judge a saved example on a subject; return None if it passes, else the fault as a sentence.

    A copy that the backend declines, as it may, passes. `ValueError` as `load` raises.
    """
    case, about = load(path.read_text(encoding="utf-8"), subject.device)
    end = about.get("end", ENDS[0])
    with _reading():
        if end not in ENDS:
            raise ValueError(f"expected end to be one of {', '.join(ENDS)}, got {end!r}")
    judge = Judge(subject, Facility(subject.device, subject.emulated), about.get("seed", 0))
    try:
        if about.get("direct"):
            judge.launch(case)
        else:
            judge.copy(case, end=end)
    except AssertionError as error:
        return str(error)
    return None


def _side(side: Side) -> JsonObject:
    if side.arrangement is None:
        raise ValueError(
            f"Expected a side that an arrangement describes, got {side!r}. Build the side from an "
            f"arrangement to save it."
        )
    to = asdict(side.arrangement)
    ids = side.ids
    to["dtype"] = str(side.arrangement.dtype).removeprefix("torch.")
    to["kinds"] = [kind.__name__ for kind in side.arrangement.kinds]
    ids_document = None
    if ids is not None:
        ids_document = {
            "values": ids.tolist(),
            "dtype": str(ids.dtype).removeprefix("torch."),
            "device": str(ids.device),
            "stride": ids.stride(0),
        }
    described = {"arrangement": to, "declared": side.extents, "step": side.step}
    return {**described, "offset": side.offset, "ids": ids_document}


def _build(document: JsonObject, to: Callable[[str], str], shared: Side | None = None) -> Side:
    """Return the side of a document, with the tensors of ``shared`` if it is passed."""
    ids = _ids(document["ids"], to)
    step = document["step"]
    offset = document["offset"]
    if shared is not None:
        return replace(shared, ids=ids, step=step, offset=offset)
    values = dict(document["arrangement"])
    values["dtype"] = _dtype(values["dtype"])
    values["kinds"] = tuple(_KINDS[name] for name in values["kinds"])
    values["order"] = tuple(values["order"])
    values["pads"] = {int(place): pad for place, pad in values["pads"].items()}
    values["extents"] = _extents(values["extents"])
    values["device"] = to(values["device"])
    return side_of(Arrangement(**values), ids, step, offset, _extents(document["declared"]))


def _extents(document: JsonObject) -> JsonObject:
    return {axis: tuple(n) if isinstance(n, list) else n for axis, n in document.items()}


def _ids(document: JsonObject | None, to: Callable[[str], str]) -> torch.Tensor | None:
    if document is None:
        return None
    values = torch.tensor(document["values"], dtype=_dtype(document["dtype"]))
    step = max(document["stride"], 1)
    wide = values.new_full((max(len(values), 1) * step,), -1).to(to(document["device"]))
    spread = wide[::step][: len(values)]
    spread.copy_(values)
    return spread


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected the name of a torch dtype, got {name!r}")
    return dtype


@contextmanager
def blaming(judge: Judge, *suspects: Case) -> Iterator[None]:
    """Retain, if the block fails, the first of ``suspects`` that fails alone as the judge's failing
    case; none if each passes alone."""

    def fails_alone(case: Case) -> bool:
        try:
            Judge(judge.subject, judge.facility, judge.seed).copy(load(dump(case))[0])
        except ValueError:  # tensors that no arrangement describes
            return False
        except AssertionError:
            return True
        return False

    try:
        yield
    except Exception as fault:  # a wrong byte, or any error of the judged backend
        judge.fault = judge.fault or str(fault)
        judge.direct = False
        judge.failing = next(filter(fails_alone, suspects), None)
        raise
