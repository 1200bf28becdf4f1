# SPDX-License-Identifier: Apache-2.0
"""Committed results, a whole sealed report for each backend-device pair, and the support table,
whose rows come from the matrix: a level that has expired says so, until it is reached again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from portakv_conformance.evidence import support_matrix
from portakv_conformance.evidence.support_matrix import Digest, SupportLevel, SupportMatrix, digest
from portakv_conformance.evidence.verdict import SEAL, digest_of
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.record import RunRecord
from portakv_conformance.report.words import built, emulated, text

Check = Callable[[str], list[str]]
# Packages of the environment whose versions a result stands or falls with, beyond torch's own.
_PACKAGES = {
    "triton": ("triton",),
    "compiled": ("triton",),
    "hip": ("hip",),
    "ascend": ("cann",),
    "cuda": ("nvidia-cuda-nvrtc", "cuda-bindings"),
}


def device_kind(record: RunRecord) -> str:
    """Return the requested device's type, without an index: ``cuda`` for ``cuda:1``.

    ``simdev:mlu`` stays ``simdev:mlu``.
    """
    return re.sub(r":\d+$", "", str(record.environment.get("device", "")))


def file_name(record: RunRecord) -> str:
    """Return ``<backend>-<device>-<suite>.json``, with the real name of a real device.

    If a library was built to carry plans out, the name has it too.
    """
    kind = device_kind(record)
    named = record.environment.get("device_name") or kind
    on_host = kind == "cpu" or record.environment.get("emulated") is not False
    place = f"{kind if on_host else named} {built(record)}"
    parts = (part.lower() for part in (record.backend["name"], place, record.suite))
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part).strip("-.") for part in parts) + ".json"


def read(file: Path) -> RunRecord:
    """Return a report that is as its run left it.

    `ValueError`, a sentence that names the file: it is not a report, or its seal is broken.
    """
    try:
        record = RunRecord.read(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if record.environment.get(SEAL) != digest_of(record):
        raise ValueError(
            f"Expected {file} as its run wrote it, but its seal does not fit its contents. "
            f"Make the report again with `portakv conform ... --report`."
        )
    return record


def keep(report: Path, folder: Path, check: Check = check_report) -> Path:
    """Put a report among the results in a folder, in place of an older one of the pair and suite.
    `ValueError` if it was edited, if a check finds something wrong with it, or if its run was not
    the one that certification fixes."""
    record = read(report)
    wrong = check(report.read_text(encoding="utf-8"))
    if wrong:
        raise ValueError(
            f"Expected a report that `portakv conform verify` accepts, got {report}: "
            f"{' '.join(wrong[:3])}"
        )
    if record.fuzz or record.seed:
        raise ValueError(
            f"Expected the report of a certification run, with seed 0 and fuzz 0, got {report} "
            f"with seed {record.seed} and fuzz {record.fuzz}. Run it without --seed and --fuzz."
        )
    file = folder / file_name(record)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(record.document(), encoding="utf-8", newline="\n")
    return file


def device(record: RunRecord) -> str:
    """Return the device for a reader: ``NVIDIA H200``, ``CPU (x86-64)``, ``mlu, emulated``.

    If a library was built to carry plans out, the text names it: it has a separate row.
    """
    kind = device_kind(record)
    if kind == "cpu":
        machine = str(record.environment.get("os", "")).split()[-1:] or [""]
        name = support_matrix.cpu_name(machine[0])
    elif emulated(record):
        name = kind.rpartition(":")[2]  # of simdev:mlu the name that it carries
    else:
        name = str(record.environment.get("device_name") or kind)
    parts = [name, "emulated" if emulated(record) else "", built(record)]
    return ", ".join(part for part in parts if part)


def versions(record: RunRecord) -> str:
    """Return the versions that the result holds for: torch, the vendor's packages, the driver,
    Python."""
    known = record.environment
    packages = [name for name in known if name.startswith(("torch-", "torch_"))]
    packages += [*_PACKAGES.get(record.backend["name"], ()), "driver"]
    parts = [f"{name} {known[name]}" for name in ("torch", *packages) if known.get(name)]
    parts += [f"Python {str(known['python']).split()[-1]}"] if known.get("python") else []
    return ", ".join(parts)


def verified(level: SupportLevel, matrix: SupportMatrix, digest: Digest = digest) -> str:
    """Return a level as a link to its evidence, with the changes since."""
    return _with_caveats(
        f"[{level.level}: {text(level.summary)}]({level.evidence})", level, matrix, digest
    )


def reached(level: SupportLevel, matrix: SupportMatrix) -> str:
    """Return a level without its link, with its device: ``R3: 1,820 passed (mlu, emulated)``."""
    return _with_caveats(
        f"{level.level}: {text(level.summary)} ({text(level.device)})", level, matrix, digest
    )


def _with_caveats(what: str, level: SupportLevel, matrix: SupportMatrix, digest: Digest) -> str:
    since = support_matrix.why_expired(level, matrix, digest)
    parts = [f"expired: {what}" if since else what, since, *map(text, level.caveats)]
    return ", ".join(part for part in parts if part)


def table(
    matrix: SupportMatrix,
    digest: Digest = digest,
    newer: Callable[[SupportLevel], int] = lambda _: 0,
) -> str:
    """Return the matrix as a Markdown table: a line for each pair, its highest level first.

    ``newer``: returns how many cases the suite got after the run that proves a level.
    """
    lines = ["| backend | device | verified | date |", "|---|---|---|---|"]
    for (backend, device), levels in support_matrix.by_pair(matrix).items():
        cells = list[str]()
        for level in levels:
            count = newer(level)
            more = f", {count} newer cases not run" if count else ""
            cells.append(f"{verified(level, matrix, digest)}{more}")
        reached = "; ".join(cells)
        lines.append(f"| `{backend}` | {text(device)} | {reached} | {levels[0].date} |")
    return "\n".join(lines)
