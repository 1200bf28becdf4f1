# SPDX-License-Identifier: Apache-2.0
"""Read and write the support matrix: how far each backend was verified on each device.

``support_matrix.toml`` has a row for each support level of each backend-device pair, with the file
that proves it. A level has expired if one of these changed since: the backend's source, the code
that emulated its device, the suite, a package of the vendor.

R0 described, R1 call shapes against a stand-in, R2 accepted by the vendor's own schemas, R3
semantics emulated, R4 cross-compiled, R5 built by the vendor's toolchain, R6 run on the hardware.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from portakv_conformance import SUITE_VERSION
from portakv_conformance.evidence.source import SourceError, source_sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parents[1] / "support_matrix.toml"
LEVELS = tuple(f"R{number}" for number in range(7))
RESULTS = "conformance/results/"
_HEAD = """\
# How far each backend was verified on each device. Each row names a level and the file that proves
# it; tests/conformance/test_support_matrix.py compares them. .ci/keep_result.py writes this file.
# README.md's table and `portakv backends` read it. A level whose hashes changed has expired.
#
# [vendor] names the packages of vendors that count now, by sha256.
"""
#: The levels of emulated devices: each names the emulation, and expires with it.
EMULATED = ("R1", "R2", "R3")
_EMULATIONS = "portakv_conformance.vendor."
_OURS = ("portakv.", "portakv_conformance.")
# PortaKV's own backends come first, in the order of the README; others follow by name.
_ORDER = ("reference", "cuda", "triton", "compiled", "hip", "ascend", "mlu")


@dataclass(frozen=True)
class SupportLevel:
    """Describe one support level of one backend-device pair."""

    backend: str  # by name
    target: str  # ``module:Class``
    device: str  # for a reader: ``NVIDIA H200``, ``CPU (x86-64)``, ``mlu, emulated``
    level: str  # ``R0`` to ``R6``
    emulated: bool  # an emulation took the place of the real device
    evidence: str  # the result file, from the repository's root
    summary: str  # the result in a few words
    command: str  # repeats the run
    date: str
    versions: str  # that the level is valid for
    source_sha256: str  # of the backend's source at that time
    suite: str = ""  # version of the suite; empty for other jobs
    vendor: Mapping[str, str] = field(default_factory=dict)  # sha256 of the packages used
    note: str = ""  # a caveat, printed after the level
    assumption: str = ""  # a clause: what the emulation assumes without the vendor's confirmation
    # The sha256 of the source of each module that emulated; of a third party's module the version.
    emulation: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str, str]:
        """Return the identity of the row: no two rows have the same."""
        return self.backend, self.device, self.level

    @property
    def caveats(self) -> list[str]:
        """Return the clauses that each display of the level includes."""
        return [clause for clause in (self.assumption, self.note) if clause]


@dataclass(frozen=True)
class SupportMatrix:
    """Hold all support levels, and the vendors' packages that count now (sha256 by name)."""

    levels: tuple[SupportLevel, ...]
    vendor: Mapping[str, str] = field(default_factory=dict)

    def with_level(self, made: SupportLevel) -> SupportMatrix:
        """Return the matrix with a level in place of the older one in its row.

        The vendor's packages of the new level count from now on.
        """
        retained = tuple(level for level in self.levels if level.place != made.place)
        return SupportMatrix((*retained, made), {**self.vendor, **made.vendor})


Digest = Callable[[str], str]


@cache
def digest(target: str) -> str:
    """Return the current hash of a backend's source, computed once in a process."""
    return source_sha256(target)


def why_expired(level: SupportLevel, matrix: SupportMatrix, digest: Digest = digest) -> str:
    """Return why a level no longer counts, in a few words; empty if it counts.

    Only this repository's sources are compared: a third party's may not be installed here.
    """
    since = []
    if _changed(level.target, level.source_sha256, digest):
        since.append("source changed since")
    if level.level in EMULATED and level.emulated and not level.emulation:
        since.append("it does not say what emulated it")
    for module, sha256 in level.emulation.items():
        if module != level.target.partition(":")[0] and _changed(module, sha256, digest):
            since.append(f"{module.rpartition('.')[2]} changed since")
    if level.suite and level.suite != SUITE_VERSION:
        since.append(f"suite {level.suite}, now {SUITE_VERSION}")
    for package, sha256 in level.vendor.items():
        if matrix.vendor.get(package) != sha256:
            since.append(f"{package} changed since")
    return ", ".join(since)


def _changed(target: str, sha256: str, digest: Digest) -> bool:
    """Return True if a source of this repository has changed or is missing."""
    if not target.startswith(_OURS):
        return False
    try:
        return digest(target) != sha256
    except SourceError:
        return True


def broken_rules(matrix: SupportMatrix) -> Iterator[str]:
    """Yield each violation of the rules that do not depend on the files, as a sentence."""
    places = [level.place for level in matrix.levels]
    for at, level in enumerate(matrix.levels):
        name = " ".join(level.place)
        real = not level.emulated
        top = level.level == "R6"
        own = level.target.startswith(_EMULATIONS)
        device_says_so = real or "emulated" in level.device or level.level not in EMULATED
        inside = level.evidence.startswith(RESULTS) and ".." not in level.evidence
        rules = {
            f"there is no level {level.level!r}; expected one of {', '.join(LEVELS)}": level.level
            in LEVELS,
            "an emulated device is never R6": real or not top,
            "R6 needs a report of the suite": bool(level.suite) or not top,
            "what ran on the real device is R6 or no level": top or not real,
            f"{level.target} emulates a vendor's backend, and is at most R3": not (
                own and level.level in ("R4", "R5", "R6")
            ),
            "the device has to say that it is emulated": device_says_so,
            "listed twice": level.place not in places[:at],
            f"the evidence {level.evidence!r} does not lie in {RESULTS}": inside,
        }
        yield from (f"{name}: {rule}." for rule, holds in rules.items() if not holds)


def by_pair(matrix: SupportMatrix) -> dict[tuple[str, str], list[SupportLevel]]:
    """Return the levels of each pair, highest first; pairs in the order of the README's table."""
    pairs: dict[tuple[str, str], list[SupportLevel]] = {}
    for level in sorted(matrix.levels, key=lambda level: level.level, reverse=True):
        pairs.setdefault((level.backend, level.device), []).append(level)

    def place(pair: tuple[str, str]) -> tuple[int, str, int, str]:
        rank = _ORDER.index(pair[0]) if pair[0] in _ORDER else len(_ORDER)
        return rank, pair[0], pairs[pair][0].level != "R6", pair[1]

    return {pair: pairs[pair] for pair in sorted(pairs, key=place)}


def summary(backend: str, device: str, matrix: SupportMatrix, digest: Digest = digest) -> str:
    """Return a backend's support level for a list, on ``device`` or else its highest anywhere.

    Examples: ``R6``, ``R6 on NVIDIA H200``, ``expired R3 on mlu, emulated``. Caveats of the level
    follow. The text is empty if the matrix has no level of the backend.
    """
    own = {pair: levels for pair, levels in by_pair(matrix).items() if pair[0] == backend}
    here = own.get((backend, device), [])
    levels = here or [level for levels in own.values() for level in levels]
    if not levels:
        return ""
    # The highest valid level, else the highest expired one.
    best = max(levels, key=lambda level: (not why_expired(level, matrix, digest), level.level))
    expired = "expired " if why_expired(best, matrix, digest) else ""
    return ", ".join(
        [f"{expired}{best.level}{'' if here else f' on {best.device}'}", *best.caveats]
    )


def cpu_name(machine: str) -> str:
    """Return the name of a kind of CPU, ``CPU (x86-64)``: one row serves all its machines."""
    return f"CPU ({machine.replace('_', '-')})"


def read(file: Path = FILE) -> SupportMatrix:
    """Return the matrix in a file; raise `ValueError`, a sentence, for any other file."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        levels = tuple(SupportLevel(**row) for row in values.get("level", []))
        vendor = dict(values.get("vendor", {}))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"Expected a support matrix, got {file}: {error}") from error
    for level in levels:
        for entry in fields(SupportLevel):
            value = getattr(level, entry.name)
            kind = {"emulated": bool, "vendor": dict, "emulation": dict}.get(entry.name, str)
            if type(value) is not kind:
                raise ValueError(
                    f"Expected {entry.name} in {file} to be {kind.__name__}, got {value!r}."
                )
    return SupportMatrix(levels, vendor)


def written(matrix: SupportMatrix) -> str:
    """Return the text of the file."""
    tables: list[tuple[str, Mapping[str, object]]] = [("[vendor]", matrix.vendor)]
    for levels in by_pair(matrix).values():
        tables += [("[[level]]", asdict(level)) for level in levels]
    parts = [_HEAD]
    for head, values in tables:
        shown = {name: value for name, value in values.items() if value not in ("", {})}
        lines = (f"{_key(name)} = {_value(value)}\n" for name, value in shown.items())
        parts += [f"\n{head}\n", *lines] if shown else []
    return "".join(parts)


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(n)} = {_value(v)}" for n, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
