# SPDX-License-Identifier: Apache-2.0
"""The command of a report against the rest of it: it has to ask for what was run, no more or less.

Who repeats the command must get the run that the report tells of; so it names the backend, and no
option stands in it that the report does not show.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from portakv_conformance.evidence.environment import INTERPRET
from portakv_conformance.record import RunRecord

_YES = ("1", "true", "on", "yes")


def words_of(record: RunRecord) -> list[str]:
    """The command in words; none where a quote in it is not closed."""
    try:
        return shlex.split(record.command)
    except ValueError:
        return []


def jobs_of(record: RunRecord) -> int:
    """How many cases ran at a time, as the command says."""
    words = words_of(record)
    told = words[words.index("--jobs") + 1 :][:1] if "--jobs" in words else []
    return int(told[0]) if told and told[0].isdecimal() else 1


def contradictions(record: RunRecord) -> Iterator[str]:
    """What the command asks for and the report does not tell, or the other way, a sentence each."""
    words = words_of(record)
    device = str(record.environment.get("device", ""))
    expected = [["--device", device], ["--profile", record.profile], ["--seed", str(record.seed)]]
    expected += [["--fuzz", str(record.fuzz)]] if record.fuzz else []
    pairs = [words[at : at + 2] for at in range(len(words))]
    for pair in expected:
        if pair not in pairs:
            yield f"Its command does not say {' '.join(pair)}: {record.command}"
    told = {
        "--only": record.verdict != "conformant",
        "--fuzz": record.fuzz != 0,
        "--waivers": bool(record.waivers),
        "--emulated": record.environment.get("emulated") is not False,
    }
    for word, shown in told.items():
        if word in words and not shown:
            yield f"Its command has {word}, which does not fit the rest of it: {record.command}"
    yield from _backend(record, words)
    yield from _interpreter(record, words)


def _backend(record: RunRecord, words: list[str]) -> Iterator[str]:
    """It begins with ``portakv conform`` and the backend, by its name or as ``pkg.mod:Class``."""
    start = [word for word in words if "=" not in word or word.startswith("-")][:3]
    asked = start[2] if start[:2] == ["portakv", "conform"] and len(start) == 3 else ""
    name, target = (str(record.backend.get(key, "")) for key in ("name", "target"))
    # A package may offer its class in another module than the one that defines it.
    offered = ":" in asked and asked.rpartition(":")[2] == target.rpartition(":")[2]
    if asked not in (name, target) and not offered:
        yield f"Its command does not judge {name!r} ({target}): {record.command}"


def _interpreter(record: RunRecord, words: list[str]) -> Iterator[str]:
    """Kernels that an interpreter ran are emulated."""
    asked = [word.partition("=")[2] for word in words if word.startswith(f"{INTERPRET}=")]
    inside = str(record.environment.get(INTERPRET, "")).lower() in _YES
    ours = str(record.backend.get("target", "")).startswith("portakv.backends.triton:")
    on_host = str(record.environment.get("device", "")) == "cpu"
    meant = ours and on_host and any(value.lower() in _YES for value in asked)
    if (inside or meant) and record.environment.get("emulated") is not True:
        yield f"An interpreter ran its kernels ({INTERPRET}), but it says that nothing is emulated."
