# SPDX-License-Identifier: Apache-2.0
"""The ladder: how far each backend was verified on each device, and whether that still holds.

``ladder.toml`` has a row for each rung of each pair, with the file that bears it out. A rung counts
as expired if the backend's source, what emulated its device, the suite or a package of the
vendor's is another one now.

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
from typing import Any

from portakv_conformance import SUITE_VERSION
from portakv_conformance.evidence.source import SourceError, source_sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parents[1] / "ladder.toml"
RUNGS = tuple(f"R{number}" for number in range(7))
RESULTS = "conformance/results/"
_HEAD = """\
# How far each backend was verified on each device. A row for each rung, with the file that bears it
# out: tests/conformance/test_ladder.py compares them. Written by .ci/keep_result.py; README.md's
# table and `portakv backends` are made from it. A rung whose hashes no longer match counts as
# expired.
#
# [vendor] names the packages of vendors that count now, by sha256.
"""
#: The rungs of what emulates: each says what did, and ends with it.
EMULATED = ("R1", "R2", "R3")
_EMULATIONS = "portakv_conformance.vendor."
_OURS = ("portakv.", "portakv_conformance.")
# PortaKV's own first, in the order of the README; others follow by name.
_ORDER = ("reference", "cuda", "triton", "compiled", "hip", "ascend", "mlu")


@dataclass(frozen=True)
class Rung:
    """One rung of one backend-device pair."""

    backend: str  # by name
    target: str  # ``module:Class``
    device: str  # for a reader: ``NVIDIA H200``, ``CPU (x86-64)``, ``mlu, emulated``
    rung: str  # ``R0`` to ``R6``
    emulated: bool  # less than the real device was at work
    evidence: str  # the result file, from the repository's root
    told: str  # what it says, in a few words
    command: str  # what repeats it
    date: str
    versions: str  # what it holds for
    source_sha256: str  # of the backend's source then
    suite: str = ""  # its version; empty for other jobs
    vendor: Mapping[str, str] = field(default_factory=dict)  # sha256 of packages it holds for
    note: str = ""  # what a reader has to know, words that stand behind the rung
    assumption: str = ""  # a clause: what the emulation takes for true without the vendor's word
    # Of each module that emulated the sha256 of its source, of a third party's the version.
    emulation: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str, str]:
        """What no two rows share."""
        return self.backend, self.device, self.rung

    @property
    def caveats(self) -> list[str]:
        """What never stands apart from the rung, clauses."""
        return [clause for clause in (self.assumption, self.note) if clause]


@dataclass(frozen=True)
class Ladder:
    """All rungs, and the packages of vendors that count now (sha256 by name)."""

    rungs: tuple[Rung, ...]
    vendor: Mapping[str, str] = field(default_factory=dict)

    def with_rung(self, made: Rung) -> Ladder:
        """The ladder with a rung in place of an older one of its pair. The vendor's packages that
        it holds for are those that count from now on."""
        retained = tuple(rung for rung in self.rungs if rung.place != made.place)
        return Ladder((*retained, made), {**self.vendor, **made.vendor})


Digest = Callable[[str], str]


@cache
def digest(target: str) -> str:
    """The hash of a backend's source as it is now; asked once in a process."""
    return source_sha256(target)


def why_expired(rung: Rung, ladder: Ladder, digest: Digest = digest) -> str:
    """Why a rung no longer counts, in a few words; empty if it does. Only sources of this
    repository are looked at: a third party's may be installed here or not."""
    since = []
    if _changed(rung.target, rung.source_sha256, digest):
        since.append("source changed since")
    if rung.rung in EMULATED and rung.emulated and not rung.emulation:
        since.append("it does not say what emulated it")
    for module, sha256 in rung.emulation.items():
        if module != rung.target.partition(":")[0] and _changed(module, sha256, digest):
            since.append(f"{module.rpartition('.')[2]} changed since")
    if rung.suite and rung.suite != SUITE_VERSION:
        since.append(f"suite {rung.suite}, now {SUITE_VERSION}")
    for package, sha256 in rung.vendor.items():
        if ladder.vendor.get(package) != sha256:
            since.append(f"{package} changed since")
    return ", ".join(since)


def _changed(target: str, sha256: str, digest: Digest) -> bool:
    """Whether a source of this repository is another one now, or gone."""
    if not target.startswith(_OURS):
        return False
    try:
        return digest(target) != sha256
    except SourceError:
        return True


def broken_rules(ladder: Ladder) -> Iterator[str]:
    """What contradicts the rules that hold whatever the files say; a sentence each."""
    places = [rung.place for rung in ladder.rungs]
    for at, rung in enumerate(ladder.rungs):
        name = " ".join(rung.place)
        real = not rung.emulated
        top = rung.rung == "R6"
        own = rung.target.startswith(_EMULATIONS)
        reported = real or "emulated" in rung.device or rung.rung not in EMULATED
        inside = rung.evidence.startswith(RESULTS) and ".." not in rung.evidence
        rules = {
            f"there is no rung {rung.rung!r}; expected one of {', '.join(RUNGS)}": rung.rung
            in RUNGS,
            "an emulated device is never R6": real or not top,
            "R6 needs a report of the suite": bool(rung.suite) or not top,
            "what ran on the real device is R6 or no rung": top or not real,
            f"{rung.target} emulates a vendor's backend, and is at most R3": not (
                own and rung.rung in ("R4", "R5", "R6")
            ),
            "the device has to say that it is emulated": reported,
            "listed twice": rung.place not in places[:at],
            f"the evidence {rung.evidence!r} does not lie in {RESULTS}": inside,
        }
        yield from (f"{name}: {rule}." for rule, holds in rules.items() if not holds)


def by_pair(ladder: Ladder) -> dict[tuple[str, str], list[Rung]]:
    """The rungs of each pair, highest first; pairs in the order of the README's table."""
    pairs: dict[tuple[str, str], list[Rung]] = {}
    for rung in sorted(ladder.rungs, key=lambda rung: rung.rung, reverse=True):
        pairs.setdefault((rung.backend, rung.device), []).append(rung)

    def place(pair: tuple[str, str]) -> tuple[int, str, int, str]:
        rank = _ORDER.index(pair[0]) if pair[0] in _ORDER else len(_ORDER)
        return rank, pair[0], pairs[pair][0].rung != "R6", pair[1]

    return {pair: pairs[pair] for pair in sorted(pairs, key=place)}


def told(backend: str, device: str, ladder: Ladder, digest: Digest = digest) -> str:
    """How far a backend was verified, for a list: on ``device``, else wherever it got highest;
    ``R6``, ``R6 on NVIDIA H200``, ``expired R3 on mlu, emulated``, with what has to be known of
    that rung. Empty if nothing is known."""
    own = {pair: rungs for pair, rungs in by_pair(ladder).items() if pair[0] == backend}
    here = own.get((backend, device), [])
    rungs = here or [rung for rungs in own.values() for rung in rungs]
    if not rungs:
        return ""
    # The highest rung that holds, else the highest that expired.
    best = max(rungs, key=lambda rung: (not why_expired(rung, ladder, digest), rung.rung))
    expired = "expired " if why_expired(best, ladder, digest) else ""
    return ", ".join([f"{expired}{best.rung}{'' if here else f' on {best.device}'}", *best.caveats])


def cpu_name(machine: str) -> str:
    """A CPU by its kind, ``CPU (x86-64)``: one row serves all machines of it."""
    return f"CPU ({machine.replace('_', '-')})"


def read(file: Path = FILE) -> Ladder:
    """The ladder in a file; `ValueError`, a sentence, if it is no such file."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        rungs = tuple(Rung(**row) for row in values.get("rung", []))
        vendor = dict(values.get("vendor", {}))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is no ladder: {error}") from error
    for rung in rungs:
        for entry in fields(Rung):
            supplied = getattr(rung, entry.name)
            kind = {"emulated": bool, "vendor": dict, "emulation": dict}.get(entry.name, str)
            if type(supplied) is not kind:
                raise ValueError(f"{file}: {entry.name} is {supplied!r}, expected {kind.__name__}.")
    return Ladder(rungs, vendor)


def written(ladder: Ladder) -> str:
    """The text of the file."""
    tables: list[tuple[str, Mapping[str, Any]]] = [("[vendor]", ladder.vendor)]
    for rungs in by_pair(ladder).values():
        tables += [("[[rung]]", asdict(rung)) for rung in rungs]
    parts = [_HEAD]
    for head, values in tables:
        shown = {name: value for name, value in values.items() if value not in ("", {})}
        lines = (f"{_key(name)} = {_value(value)}\n" for name, value in shown.items())
        parts += [f"\n{head}\n", *lines] if shown else []
    return "".join(parts)


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii()
    return name if plain else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(n)} = {_value(v)}" for n, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
