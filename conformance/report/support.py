# SPDX-License-Identifier: Apache-2.0
"""The support table: what was verified on each backend-device pair, and whether it still holds.

Rows come from the committed results, and from a list in words for pairs without one. A rung
expires when the backend's source changes: the row then says so, until the suite has run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import SUITE_VERSION
from ..records import RunRecord
from ..source import SourceError, source_sha256
from .markdown import text
from .results import device_kind
from .words import bad, counts, emulated, plural

# Packages of the environment whose versions a result stands or falls with, beyond torch's own.
_PACKAGES = {
    "triton": ("triton",),
    "compiled": ("triton",),
    "cuda": ("nvidia-cuda-nvrtc", "cuda-bindings"),
}
_OURS = "portakv."
# PortaKV's own first; others follow by name.
_ORDER = ("reference", "cuda", "triton", "compiled", "hip", "ascend", "mlu")


@dataclass(frozen=True)
class Row:
    """One backend-device pair: what was verified, with which versions, on which day."""

    backend: str
    device: str
    verified: str
    versions: str
    date: str


def row(record: RunRecord, link: str, digest: Callable[[str], str] = source_sha256) -> Row:
    """The row of a result. ``link`` is where the table finds its file."""
    return Row(
        backend=record.backend["name"],
        device=device(record),
        verified=verified(record, link, digest),
        versions=versions(record),
        date=record.started[:10],
    )


def device(record: RunRecord) -> str:
    """The device for a reader: ``NVIDIA H200``, ``CPU (x86-64)``, ``simdev, emulated``."""
    kind = device_kind(record)
    if kind == "cpu":
        machine = str(record.environment.get("os", "")).split()[-1:] or [""]
        name = f"CPU ({machine[0].replace('_', '-')})"
    else:
        name = kind if emulated(record) else str(record.environment.get("device_name") or kind)
    return f"{name}, emulated" if emulated(record) else name


def verified(record: RunRecord, link: str, digest: Callable[[str], str] = source_sha256) -> str:
    """The outcome as a link to the report, and what has changed since."""
    since = []
    if changed(record, digest):
        since.append("source changed since")
    if record.suite != SUITE_VERSION:
        since.append(f"suite {record.suite}, now {SUITE_VERSION}")
    linked = f"[{outcome(record)}]({link})"
    if not since:
        return linked
    return f"{'expired: ' if record.rung else ''}{linked}, {', '.join(since)}"


def outcome(record: RunRecord) -> str:
    """``R6: 412 cases``, ``failed: 3 of 412 cases``, ..."""
    total = plural(len(record.cases), "case")
    if record.verdict == "failed":
        return f"failed: {bad(record)} of {total}"
    if record.verdict != "conformant":
        return f"{record.verdict}: {total}"
    waived = counts(record)["waived"]
    excused = f", {waived} waived" if waived else ""
    if record.rung:
        return f"{record.rung}: {total}"
    return f"conformant, no rung: {record.profile} profile, {total}{excused}"


def changed(record: RunRecord, digest: Callable[[str], str] = source_sha256) -> bool:
    """Whether the backend's source is another than the one that was judged.

    Only sources of this repository are looked at: a third party's may be installed here or not.
    """
    target = record.backend["target"]
    if not target.startswith(_OURS):
        return False
    try:
        return digest(target) != record.backend["source_sha256"]
    except SourceError:
        return True  # the backend is gone


def versions(record: RunRecord) -> str:
    """What the result holds for: torch, the vendor's packages, the driver, Python."""
    known = record.environment
    packages = [name for name in known if name.startswith(("torch-", "torch_"))]
    packages += _PACKAGES.get(record.backend["name"], ())
    parts = [f"{name} {known[name]}" for name in ("torch", *packages) if known.get(name)]
    if known.get("driver"):
        parts.append(f"driver {known['driver']}")
    if known.get("python"):
        parts.append(f"Python {str(known['python']).split()[-1]}")
    return ", ".join(parts)


def rows(
    results: Mapping[Path, RunRecord],
    in_words: list[dict[str, str]],
    root: Path,
    digest: Callable[[str], str] = source_sha256,
) -> list[Row]:
    """All rows by backend, those of a report first; of several reports of a pair the newest.

    Raises:
        ValueError: a pair has a result and is listed in words too.
    """
    latest: dict[tuple[str, str], tuple[tuple[str, str], Row]] = {}
    for file, record in results.items():
        made = row(record, file.relative_to(root).as_posix(), digest)
        age = (record.suite, record.started)
        pair = (made.backend, made.device)
        if pair not in latest or latest[pair][0] < age:
            latest[pair] = (age, made)
    found = sorted((made for _, made in latest.values()), key=lambda made: made.device)
    for listed in in_words:
        if (listed["backend"], listed["device"]) in latest:
            raise ValueError(
                f"{listed['backend']} on {listed['device']} is listed in support.toml, but there "
                "is a report of it in conformance/results; take it out of support.toml."
            )
        found.append(Row(**listed))
    rank = {name: place for place, name in enumerate(_ORDER)}
    return sorted(found, key=lambda made: (rank.get(made.backend, len(rank)), made.backend))


def table(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["| backend | device | verified | versions | date |", "|---|---|---|---|---|"]
    return "\n".join(
        head
        + [f"| `{r.backend}` | {text(r.device)} | {r.verified} | {text(r.versions)} | {r.date} |"
           for r in found]
    )  # fmt: skip
