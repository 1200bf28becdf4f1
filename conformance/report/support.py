# SPDX-License-Identifier: Apache-2.0
"""The support table: what was verified on each backend-device pair, and whether it still holds.

Rows come from the ladder. A rung expires when the backend's source, the suite or a package of the
vendor's changes: the row then says so, until it was reached again.
"""

from __future__ import annotations

from portakv_conformance.evidence.ladder import (
    Digest,
    Ladder,
    Rung,
    by_pair,
    cpu_name,
    digest,
    why_expired,
)
from portakv_conformance.record import RunRecord
from portakv_conformance.report.results import device_kind
from portakv_conformance.report.words import built, emulated, text

# Packages of the environment whose versions a result stands or falls with, beyond torch's own.
_PACKAGES = {
    "triton": ("triton",), "compiled": ("triton",), "hip": ("hip",), "ascend": ("cann",),
    "cuda": ("nvidia-cuda-nvrtc", "cuda-bindings"),
}  # fmt: skip


def device(record: RunRecord) -> str:
    """The device for a reader: ``NVIDIA H200``, ``CPU (x86-64)``, ``mlu, emulated``; with what
    carried plans out, where a library was built for that: it has a row of its own."""
    kind = device_kind(record)
    if kind == "cpu":
        machine = str(record.environment.get("os", "")).split()[-1:] or [""]
        name = cpu_name(machine[0])
    elif emulated(record):
        name = kind.rpartition(":")[2]  # of simdev:mlu the name that it carries
    else:
        name = str(record.environment.get("device_name") or kind)
    parts = [name, "emulated" if emulated(record) else "", built(record)]
    return ", ".join(part for part in parts if part)


def versions(record: RunRecord) -> str:
    """What the result holds for: torch, the vendor's packages, the driver, Python."""
    known = record.environment
    packages = [name for name in known if name.startswith(("torch-", "torch_"))]
    packages += [*_PACKAGES.get(record.backend["name"], ()), "driver"]
    parts = [f"{name} {known[name]}" for name in ("torch", *packages) if known.get(name)]
    parts += [f"Python {str(known['python']).split()[-1]}"] if known.get("python") else []
    return ", ".join(parts)


def verified(rung: Rung, ladder: Ladder, digest: Digest = digest) -> str:
    """A rung as a link to its evidence, and what has changed since."""
    return _told(f"[{rung.rung}: {text(rung.told)}]({rung.evidence})", rung, ladder, digest)


def reached(rung: Rung, ladder: Ladder) -> str:
    """A rung without its link, with the device that it is about: ``R3: 1,820 passed (mlu,
    emulated)``."""
    return _told(f"{rung.rung}: {text(rung.told)} ({text(rung.device)})", rung, ladder, digest)


def _told(what: str, rung: Rung, ladder: Ladder, digest: Digest) -> str:
    since = why_expired(rung, ladder, digest)
    parts = [f"expired: {what}" if since else what, since, *map(text, rung.caveats)]
    return ", ".join(part for part in parts if part)


def table(ladder: Ladder, digest: Digest = digest) -> str:
    """The ladder as a Markdown table: a line for each pair, its highest rung first."""
    lines = ["| backend | device | verified | versions | date |", "|---|---|---|---|---|"]
    for (backend, device), rungs in by_pair(ladder).items():
        reached = "; ".join(verified(rung, ladder, digest) for rung in rungs)
        told, date = text(rungs[0].versions), rungs[0].date
        lines.append(f"| `{backend}` | {text(device)} | {reached} | {told} | {date} |")
    return "\n".join(lines)
