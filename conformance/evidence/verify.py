# SPDX-License-Identifier: Apache-2.0
"""Check that a report is complete, unchanged and consistent with the installed suite.

No check needs the device or the backend. The checks do not stop a forger of a whole report, seal
included. A reader who does not trust a report can repeat its run by one command.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from math import isfinite
from typing import TypeAlias

from portakv.backends.base import Capabilities
from portakv_conformance import SPEC_VERSION, SUITE_VERSION
from portakv_conformance.evidence import verdict
from portakv_conformance.evidence.environment import INTERPRET, YES, assumed
from portakv_conformance.evidence.source import SHA256
from portakv_conformance.judge.subject import SIMULATED
from portakv_conformance.judge.waivers import problems as waiver_problems
from portakv_conformance.record import ASSUMPTION, LIBRARY, CaseRecord, JsonObject, RunRecord
from portakv_conformance.run.runner import cases_of
from portakv_conformance.vendor.standins import SIMULATION, STANDINS

#: By id, the facts of each case of a profile: see `runner.cases_of`.
_Facts: TypeAlias = dict[str, JsonObject]
#: ``(profile, device) -> facts of each case``.
Listing: TypeAlias = Callable[[str, str], _Facts]

_FACTS = ("torch", "python", "os", "device", "device_name", "driver", "emulated")
# The most that a backend can claim of a field that is not yes or no.
_WHOLE = {
    "max_loops": None,
    "alignment": 1,
    "index_dtypes": ["int32", "int64"],
    "encodings": ["pack"],
}
_IDLE = 0.1  # share of the passed cases that may copy nothing: a few judge claims only
_CLOCKS = timedelta(days=1)  # by which another machine's clock may be ahead


def check_report(text: str, listing: Listing = cases_of) -> list[str]:
    """Return each fault of a report as a sentence; empty if the report is valid.

    ``text`` is the document ``conformance.json``; ``listing`` returns the case list of the
    installed suite. `SuiteBroken`: the suite cannot be collected.
    """
    try:
        record = RunRecord.read(text)
    except (ValueError, TypeError, KeyError) as error:
        return [f"It cannot be read as a report: {error}"]

    # `RunRecord.read` has checked all other fields.
    for waiver in record.waivers:
        if not isinstance(waiver, dict) or set(waiver) != {"id", "reason", "expires"}:
            return ["A waiver of the report does not have the keys id, reason, expires."]
        if not re.fullmatch(r"\d+(\.\d+)*", str(expires := waiver["expires"])):
            return [f"A waiver of the report expires in {expires!r}, which is not a version."]
    if (record.suite, record.spec) != (SUITE_VERSION, SPEC_VERSION):
        return [
            f"It was made by suite {record.suite} (spec {record.spec}), but {SUITE_VERSION} (spec "
            f"{SPEC_VERSION}) is installed; verify it with the release that has its suite."
        ]
    faults = [*_sums(record), *_cases(record), *_facts(record), *_case_list(record, listing)]
    seal = record.environment.get(verdict.SEAL)
    if seal is None:
        faults.insert(0, f"It has no seal ({verdict.SEAL!r}): no run of the suite wrote it.")
    elif seal != verdict.digest_of(record):
        faults.insert(0, "Its seal does not fit its content: it was changed after the run.")
    return faults


def _sums(record: RunRecord) -> Iterator[str]:
    """Check the values that follow from the cases."""
    if record.totals != (totals := verdict.totals_of(record.cases)):
        yield f"Its totals are {record.totals}, but its cases count {totals}."
    if record.verdict != (follows := verdict.verdict_of(record)):
        yield f"Its verdict is {record.verdict!r}, but {follows!r} follows from its cases."
    if record.rung != (level := verdict.level_of(record)):
        yield f"It claims level {record.rung!r}, but {level!r} is what it proves: {_rule(record)}."
    if record.verdict == "conformant":
        whole = not record.missing
        yield from waiver_problems(record.waivers, record.cases, record.suite, whole=whole)


def _rule(record: RunRecord) -> str:
    """Return the rule that a claimed support level breaks."""
    if record.environment.get("emulated") is not False:
        return "its device is emulated, and R6 needs the real one"
    if record.missing:
        return "what is missing stands between it and any level"
    if lacking := verdict.unnamed(record):
        return f"R6 on an accelerator needs {' and '.join(lacking)}"
    return "R6 needs the full profile, seed 0, no fuzzing, and every case passed or not claimed"


def _cases(record: RunRecord) -> Iterator[str]:
    for id, count in Counter(case.id for case in record.cases).items():
        if count > 1:
            yield f"Case {id!r} is there {count} times."
    waived = {waiver["id"] for waiver in record.waivers}
    for case in record.cases:
        yield from _status_of(case, waived)
        yield from _counts_of(case, record.capabilities)
    if not isfinite(record.seconds):
        yield f"The run took {record.seconds} s."
    yield from _work(record)


def _status_of(case: CaseRecord, waived: set[str]) -> Iterator[str]:
    """Check a case's status against its reason, its area and the ids of the waivers."""
    status = case.status
    name = f"Case {case.id!r}"
    if status != "passed" and not case.reason:
        yield f"{name} is {status} without a reason."
    if status in ("waived", "not-claimed") and case.area == "core":
        yield f"CORE can be neither waived nor unclaimed, but {case.id!r} is {status}."
    if (status == "waived") != (case.id in waived) and status not in verdict.WRONG:
        yield f"{name} is {status}, which does not fit the report's waivers."


def _counts_of(case: CaseRecord, capabilities: JsonObject) -> Iterator[str]:
    """Check a case's counts, and a missing claim against the backend's claims."""
    name = f"Case {case.id!r}"
    # A declined layout is not an unclaimed field.
    silent = case.status == "not-claimed" and not case.declined
    value = capabilities.get(case.claim, False)
    if silent and (value is True or value == _WHOLE.get(case.claim, ...)):
        yield f"{name} is not claimed, but the backend claims {case.claim!r}."
    if case.status == "passed" and case.declined and case.declined >= case.examples:
        yield f"{name} passed, with half or more of its copies declined."
    if not (isfinite(case.seconds) and min(case.seconds, case.examples, case.declined) >= 0):
        yield f"{name} took {case.seconds} s for {case.examples} examples."


def _work(record: RunRecord) -> Iterator[str]:
    """Check that the run copied something, in a plausible time."""
    passed = [case for case in record.cases if case.status == "passed"]
    idle = sum(case.examples == 0 for case in passed)
    if record.verdict == "conformant" and idle > len(passed) * _IDLE + 1:
        yield f"{idle} of the {len(passed)} cases that passed have judged no copy."
    spent = sum(case.seconds for case in record.cases)
    if passed and not spent > 0:
        yield f"Its {len(record.cases)} cases took no time at all."
    jobs = _jobs(record)
    if spent > jobs * record.seconds * 1.05 + 1:
        order = f"{jobs} at a time" if jobs > 1 else "one after another"
        yield f"Its cases took {spent:.1f} s, {order}, but the run {record.seconds:.1f} s."


def _jobs(record: RunRecord) -> int:
    """Return the number of workers that the command names, by default 1."""
    words = _words_of(record)
    values = words[words.index("--jobs") + 1 :][:1] if "--jobs" in words else []
    return int(values[0]) if values and values[0].isdecimal() else 1


def _facts(record: RunRecord) -> Iterator[str]:
    known = record.environment
    backend = record.backend
    device = str(known.get("device", "")).partition(":")[0]
    library = known.get(LIBRARY, {})
    absent = ", ".join(name for name in _FACTS if name not in known)
    claims = {field.name for field in fields(Capabilities)}
    odd = ", ".join(sorted(set(record.capabilities) ^ claims))
    rules = {
        f"Its environment does not say {absent}.": not absent,
        "Its environment does not say whether the device is emulated, true or false.": isinstance(
            known.get("emulated", False), bool
        ),
        "Its device is simdev, which is always emulated, but it says that it is not.": device
        != SIMULATED
        or known.get("emulated") is not False,
        f"Its library is {library!r}, expected its sha256 by the name of its file.": isinstance(
            library, dict
        ),
        "It does not say the hash of the backend's source.": re.fullmatch(
            SHA256, str(backend.get("source_sha256"))
        ),
        f"Its capabilities are not the fields of a backend's claims: {odd}.": record.verdict
        != "conformant"
        or not odd,
        "It does not say what the registry answered.": record.trace,
        "It does not say the name of the backend.": backend.get("name"),
        "It does not say the target of the backend.": backend.get("target"),
        f"Its profile {record.profile!r} is not core or full.": record.profile in ("core", "full"),
    }
    yield from (sentence for sentence, holds in rules.items() if not holds)
    yield from _emulation(record, device)
    if isinstance(library, dict):
        yield from _unhashed(library, "carried plans out")
    try:
        started = datetime.fromisoformat(record.started)
        if started > datetime.now(timezone.utc) + _CLOCKS:
            yield f"It was started at {record.started}, which is yet to come."
    except (ValueError, TypeError):
        yield f"It was started at {record.started!r}, which is not a time with a zone."
    yield from _command(record)


def _emulation(record: RunRecord, device: str) -> Iterator[str]:
    """Check what emulated a device; on a CPU it is the backend itself or an interpreter."""
    if record.environment.get("emulated") is not True or device == "cpu":
        return
    emulation = record.environment.get("emulation")
    if not isinstance(emulation, dict) or not emulation:
        yield "Its device is emulated, but it does not say by what."
        return
    if device == SIMULATED or SIMULATION in emulation:
        carried = re.sub(r":\d+$", "", str(record.environment["device"])).rpartition(":")[2]
        for module in (SIMULATION, STANDINS.get(carried, SIMULATION)):
            if module not in emulation:
                yield f"Its device is {device}, but it does not say the hash of {module}."
        assumed_here = assumed((STANDINS[carried],)) if carried in STANDINS else ""
        if assumed_here and not record.environment.get(ASSUMPTION):
            yield f"It does not say what it holds by: {assumed_here}."
    yield from _unhashed(emulation, "emulated")


def _unhashed(hashes: JsonObject, what: str) -> Iterator[str]:
    for name, sha256 in hashes.items():
        if not re.fullmatch(SHA256, str(sha256)):
            yield f"It does not say the hash of {name}, which {what}."


def _case_list(record: RunRecord, listing: Listing) -> Iterator[str]:
    """Compare the case list with the installed suite's."""
    ids = {case.id for case in record.cases}
    if record.profile not in ("core", "full"):
        return
    listed = listing(record.profile, _listed_device(record))
    for id in sorted(ids - set(listed)):
        yield f"Case {id!r} is not in the installed suite's list for this profile and device."
    if record.verdict == "conformant":
        yield from _absent(record, listed)
    if not record.missing and record.case_list_sha256 != verdict.case_list_sha256(ids):
        yield "Its case-list hash is not that of its cases."
    for case in record.cases:
        known = listed.get(case.id, {})
        claimed = {name: getattr(case, name) for name in ("area", "profile", "claim", "tags")}
        if known and claimed != (known := {name: known[name] for name in claimed}):
            yield f"Case {case.id!r} is described as {claimed}, but the suite says {known}."


def newer_cases(record: RunRecord, listing: Listing = cases_of) -> list[str]:
    """Return the cases of the installed suite that a report does not have, but for those on two
    devices: the suite got them after the run."""
    if record.profile not in ("core", "full"):
        return []
    return _lacking(record, listing(record.profile, _listed_device(record)))[1]


def _lacking(record: RunRecord, listed: _Facts) -> tuple[list[str], list[str]]:
    """Return the listed cases that a report does not have: those on two devices that a real machine
    may leave out, and the others."""
    absent = sorted({*listed} - {case.id for case in record.cases})
    real = not record.environment.get("emulated")
    left_out = [id for id in absent if real and listed[id].get("optional")]
    return left_out, [id for id in absent if id not in left_out]


def _listed_device(record: RunRecord) -> str:
    """Return the device whose cases a report has."""
    device = str(record.environment.get("device", "cpu"))
    if record.environment.get("emulated") and device.partition(":")[0] != "cpu":
        return SIMULATED  # the simulated device may have had another name
    return device


def _absent(record: RunRecord, listed: _Facts) -> Iterator[str]:
    """Check that only cases on two devices are absent from a conformant report."""
    left_out, others = _lacking(record, listed)
    if left_out and verdict.LEFT_OUT not in record.environment:
        yield f"It does not say that {len(left_out)} cases on two devices were left out."
    if others:
        count = f"{len(others)} cases of the installed suite are not in it"
        yield f"{count}, the first of them {others[0]!r}."


def _words_of(record: RunRecord) -> list[str]:
    """Return the command's words; none if a quote in it is not closed."""
    try:
        return shlex.split(record.command)
    except ValueError:
        return []


def _command(record: RunRecord) -> Iterator[str]:
    """Yield each contradiction between the command and the report, as a sentence."""
    yield from _options(record)
    yield from _backend(record)
    yield from _interpreter(record)


def _options(record: RunRecord) -> Iterator[str]:
    """Compare the options of the command with the report."""
    words = _words_of(record)
    device = str(record.environment.get("device", ""))
    expected = [("--device", device), ("--profile", record.profile), ("--seed", str(record.seed))]
    expected += [("--fuzz", str(record.fuzz))] if record.fuzz else []
    for pair in expected:
        if pair not in pairwise(words):
            yield f"Its command does not say {' '.join(pair)}: {record.command}"
    allowed = {
        "--only": record.verdict != "conformant",
        "--fuzz": record.fuzz != 0,
        "--waivers": bool(record.waivers),
        "--emulated": record.environment.get("emulated") is not False,
    }
    for word, fits in allowed.items():
        if word in words and not fits:
            yield f"Its command has {word}, which does not fit the rest of it: {record.command}"


def _backend(record: RunRecord) -> Iterator[str]:
    """Compare the backend in the command with the report."""
    words = _words_of(record)
    # The command begins with `portakv conform` and the backend, by its name or as `pkg.mod:Class`.
    start = [word for word in words if "=" not in word or word.startswith("-")][:3]
    named = start[2] if start[:2] == ["portakv", "conform"] and len(start) == 3 else ""
    name, target = (str(record.backend.get(key, "")) for key in ("name", "target"))
    # A package may offer its class in another module than the one that defines it.
    offered = ":" in named and named.rpartition(":")[2] == target.rpartition(":")[2]
    if named not in (name, target) and not offered:
        yield f"Its command does not judge {name!r} ({target}): {record.command}"


def _interpreter(record: RunRecord) -> Iterator[str]:
    """Check that a report of interpreted kernels says that they are emulated."""
    words = _words_of(record)
    target = str(record.backend.get("target", ""))
    values = []
    if target.startswith("portakv.backends.triton:") and record.environment.get("device") == "cpu":
        values = [word.partition("=")[2] for word in words if word.startswith(f"{INTERPRET}=")]
    values.append(str(record.environment.get(INTERPRET, "")))
    interpreted = any(value.lower() in YES for value in values)
    if interpreted and record.environment.get("emulated") is not True:
        yield f"An interpreter ran its kernels ({INTERPRET}), but it says that nothing is emulated."
