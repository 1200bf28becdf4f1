# SPDX-License-Identifier: Apache-2.0
"""A failing example as a file: the structure of a case in JSON, rebuilt and judged again.

It holds arrangements, ids and seeds, never bytes, and needs no hypothesis to be replayed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from portakv_conformance.draw.arrangement import Arrangement, Case, Side, side_of
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import ENDS, Judge
from portakv_conformance.judge.subject import Subject

SCHEMA = "portakv-example/1"
_KINDS = {"list": list, "tuple": tuple, "dict": dict}


def dump(case: Case, about: dict[str, Any] | None = None) -> str:
    """A case as a JSON document; ``about`` says where it came from.

    Raises:
        ValueError: a side that was not built from an arrangement.
    """
    document = {
        "schema": SCHEMA, "about": about or {}, "count": case.count,
        "one_cache": case.src.tensors is case.dst.tensors,
        "src": _side(case.src), "dst": _side(case.dst),
    }  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def save(case: Case, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write a case to a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(case, about), encoding="utf-8")


def read_about(text: str) -> dict[str, Any]:
    """What a JSON document says of its case; makes no tensors, so that no device is needed.

    Raises:
        ValueError: no document of this schema.
    """
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, expected {SCHEMA!r}")
        return dict(document["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_example(error) from error


def load(text: str, device: str | torch.device | None = None) -> tuple[Case, dict[str, Any]]:
    """The case of a JSON document, with fresh tensors, and what is said about it.

    Args:
        text: the document.
        device: where to build what lay on the judged device; by default where it lay.

    Raises:
        ValueError: no document of this schema, or one with fields missing.
    """
    said = read_about(text)
    try:
        document = json.loads(text)
        move = _Move(str(said.get("device", "cpu")), None if device is None else str(device))
        src = _build(document["src"], move)
        if document["one_cache"]:
            told = document["dst"]
            ids = _ids(told["ids"], move)
            dst = replace(src, ids=ids, step=told["step"], offset=told["offset"])
        else:
            dst = _build(document["dst"], move)
        return Case(src, dst, int(document["count"])), said
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _no_example(error) from error


def _no_example(error: Exception) -> ValueError:
    return ValueError(
        f"This is no saved example of the suite ({type(error).__name__}: {error}); pass a file "
        f"that a run wrote beside its report."
    )


def replay(path: Path, subject: Subject) -> str | None:
    """Judge a saved example on a subject: None where it passes, else what is wrong, a sentence.

    A copy that the backend declines, as it may, passes; ValueError as `load` raises.
    """
    text = path.read_text(encoding="utf-8")
    case, said = load(text, subject.device)
    end = said.get("end", ENDS[0])
    if end not in ENDS:
        raise _no_example(ValueError(f"{end!r} is no way to wait for a copy"))
    judge = Judge(subject, Facility(subject.device, subject.emulated), said.get("seed", 0))
    try:
        if said.get("direct"):
            judge.launch(case)
        else:
            judge.copy(case, end=end)
    except AssertionError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Move:
    """From the device that an example was found on to the one where it is replayed."""

    found: str
    target: str | None

    def to(self, place: str) -> str:
        """Where something goes that lay at ``place``; host memory of a device's case stays."""
        stays = self.target is None or (place == "cpu" and self.found != "cpu")
        return place if self.target is None or stays else self.target


def _side(side: Side) -> dict[str, Any]:
    if side.arrangement is None:
        raise ValueError(f"{side!r} was not built from an arrangement, so it cannot be saved.")
    to = asdict(side.arrangement)
    to["dtype"] = str(side.arrangement.dtype).removeprefix("torch.")
    to["kinds"] = [kind.__name__ for kind in side.arrangement.kinds]
    told = {"arrangement": to, "declared": side.extents, "step": side.step, "offset": side.offset}
    ids = side.ids
    return told | {"ids": None if ids is None else {
        "values": ids.tolist(), "dtype": str(ids.dtype).removeprefix("torch."),
        "device": str(ids.device), "stride": ids.stride(0),
    }}  # fmt: skip


def _build(told: dict[str, Any], move: _Move) -> Side:
    values = dict(told["arrangement"])
    values["dtype"] = _dtype(values["dtype"])
    values["kinds"] = tuple(_KINDS[name] for name in values["kinds"])
    values["order"] = tuple(values["order"])
    values["pads"] = {int(place): pad for place, pad in values["pads"].items()}
    values["extents"] = _extents(values["extents"])
    values["device"] = move.to(values["device"])
    ids = _ids(told["ids"], move)
    declared = _extents(told["declared"])
    return side_of(Arrangement(**values), ids, told["step"], told["offset"], declared)


def _extents(told: dict[str, Any]) -> dict[str, Any]:
    return {axis: tuple(n) if isinstance(n, list) else n for axis, n in told.items()}


def _ids(told: dict[str, Any] | None, move: _Move) -> torch.Tensor | None:
    if told is None:
        return None
    dtype, step = _dtype(told["dtype"]), int(told["stride"])
    values = torch.tensor(told["values"], dtype=dtype)
    wide = torch.full((max(len(values), 1) * max(step, 1),), -1, dtype=dtype)
    spread = wide.to(move.to(told["device"]))[:: max(step, 1)][: len(values)]
    spread.copy_(values)
    return spread


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch")
    return dtype


@contextmanager
def blaming(judge: Judge, *suspects: Case) -> Iterator[None]:
    """Where what is inside fails, keep the first of ``suspects`` that fails on its own as the
    judge's failing case; none where each passes on its own."""
    try:
        yield
    except Exception as fault:
        judge.fault = judge.fault or str(fault)
        judge.direct = False
        judge.failing = next((case for case in suspects if _fails_alone(judge, case)), None)
        raise


def _fails_alone(judge: Judge, case: Case) -> bool:
    try:
        fresh, _ = load(dump(case))
    except ValueError:  # tensors that no arrangement describes
        return False
    try:
        Judge(judge.subject, judge.facility, judge.seed).copy(fresh)
    except AssertionError:
        return True
    return False
