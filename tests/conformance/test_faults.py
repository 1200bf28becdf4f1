# SPDX-License-Identifier: Apache-2.0
"""The fault table of storage tiers: it finds wrong bytes where there are no checks, and only there;
a fault that was not put in is never counted as right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.waits import LIMIT

from portakv_conformance.cli import main
from portakv_conformance.faults import command, places, report, source, subject, syscalls
from portakv_conformance.faults.families import Unknown, family_of, filled
from portakv_conformance.faults.report import BAD, Request, TierReport
from portakv_conformance.faults.run import CONTROL, Row, chosen, run_fault, run_faults
from portakv_conformance.faults.subject import Template, Unavailable
from portakv_conformance.faults.table import FAULTS, Fault

UNCHECKED = "portakv_conformance.faults.wrong:Unchecked"
IN_MEMORY = "portakv_conformance.faults.wrong:InMemory"
NBYTES = 16 << 10
DEADLINE = 60.0
#: Faults that a tier without checks cannot see.
UNSEEN = [
    "a bit in a block's middle flipped, open",
    "two blocks swapped, closed",
    "a block torn: its end is another's, open",
    "files of another model under their names, closed",
    "reads bring a flipped bit",
    "reads end early",
    "writes lost, reported as done",
    "writes torn, reported as whole",
    "a write astray by a page",
]
#: Faults that each tier sees, and what the one without checks makes of them.
SEEN = {
    "EIO of reads": "error",
    "killed in the fifth write": "miss",
    "EIO of fsync": "not injected",
    "the clock a day ahead": "not injected",
    "a lease on blocks that were removed": "not injected",
    "memory reused after a load was given up": "not injected",
    "a source reused after its store": "right",
}


@pytest.fixture(scope="module")
def unchecked() -> Iterator[Template]:
    with Template(UNCHECKED, None, NBYTES) as template:
        yield template


def outcomes(template: Template, names: list[str]) -> dict[str, str]:
    """Return the outcomes of faults, and that without a fault."""
    rows = run_faults(template, chosen(names), NBYTES, DEADLINE, jobs=4)
    return {row.fault: row.outcome for row in rows}


def row(fault: str, outcome: Any = "right") -> Row:
    return Row(fault, "", outcome, [], 0, 0.1)


def made(rows: list[Row], only: tuple[str, ...] = ()) -> TierReport:
    request = Request("disk", {"folder": "{folder}"}, only)
    facts: dict[str, str] = {"python": "3"}
    made_report = TierReport(
        report.SCHEMA, "2026.12", request, "family", {}, {}, facts, "2026", 1.0, "command", rows
    )
    return made_report.seal()


def test_a_tier_without_checks_delivers_wrong_bytes(unchecked: Template) -> None:
    found = outcomes(unchecked, [*UNSEEN, *SEEN])
    expected = {CONTROL: "right", **dict.fromkeys(UNSEEN, "wrong bytes"), **SEEN}
    assert found == expected


def test_a_call_that_does_not_return_is_a_hang(unchecked: Template) -> None:
    (fault,) = chosen(["hang of reads"])
    assert run_fault(fault, unchecked, NBYTES, 1.0, None).outcome == "hang"


ASSERTING = """
import threading
from portakv_conformance.faults.wrong import Unchecked

class InThread(Unchecked):
    def get(self, key, memory):
        good = threading.Event()

        def read():
            Unchecked.get(self, key, memory)
            expected = self.sums.get(key)
            assert expected in (None, bytes(memory)), "a block is another one"
            good.set()

        threading.Thread(target=read).start()
        good.wait()
        return True

    sums = {}

    def put(self, key, memory):
        self.sums[key] = bytes(memory)
        return super().put(key, memory)
"""


@pytest.fixture
def asserting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of tiers with assertions, which the process of a tier imports."""
    (tmp_path / "asserting_tiers.py").write_text(ASSERTING, encoding="utf-8")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.usefixtures("asserting")
def test_an_assertion_in_a_thread_of_a_tier_does_not_hold_up_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that waits for the thread is a hang, known long before the deadline."""
    monkeypatch.setattr(subject, "BEREAVED", 0.5)
    (fault,) = chosen(["two blocks swapped, open"])
    with Template("asserting_tiers:InThread", None, NBYTES) as template:
        result = run_fault(fault, template, NBYTES, 3600.0, None)
    assert result.outcome == "hang"
    assert any("a thread of the tier ended: AssertionError: a block is" in x for x in result.notes)


def test_an_error_of_a_call_beside_the_loads_is_the_outcome_of_its_fault(
    unchecked: Template,
) -> None:
    """It ends neither the run, nor the results of other faults."""

    def call(trial: Any) -> None:
        trial.start()
        trial.child.call("put")  # raises in the tier's process

    faults = [Fault("a call that raises", "", call), *chosen(["keys that were never stored"])]
    rows = run_faults(unchecked, faults, NBYTES, DEADLINE)
    assert [each.outcome for each in rows[1:]] == ["error", "right"]
    assert "raised TypeError" in rows[1].notes[0]


def test_a_tier_in_memory_delivers_no_wrong_bytes() -> None:
    with Template(IN_MEMORY, None, NBYTES) as template:
        found = outcomes(template, [*UNSEEN[:2], "killed after a store", "keys that were never"])
    assert found == {
        CONTROL: "miss",  # a restart loses all
        UNSEEN[0]: "not injected",
        UNSEEN[1]: "not injected",
        "killed after a store": "miss",
        "keys that were never stored": "right",
    }


def test_each_fault_has_a_name_that_chooses_it_alone() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len({*names})
    assert len(names) >= 60
    for name in names:
        assert [fault.name for fault in chosen([name])][:1] == [name]


def test_a_machine_whose_calls_are_not_listed_is_named() -> None:
    with pytest.raises(syscalls.NotSupported, match="pdp11"):
        syscalls.number_of("seccomp", "pdp11")


def test_the_numbers_of_calls_are_those_of_the_machine(tmp_path: Path) -> None:
    """Each kind that Python can reach is caught by the filter, in a process of its own."""
    code = f"""
import os, sys
from portakv_conformance.faults.syscalls import install_filter
fd = os.open({str(tmp_path / "file")!r}, os.O_RDWR | os.O_CREAT)
calls = {{
    "read": lambda: os.pread(fd, 1, 0),
    "write": lambda: os.pwrite(fd, b"x", 0),
    "sync": lambda: os.fsync(fd),
    "size": lambda: os.ftruncate(fd, 1),
    "open": lambda: os.open("/", 0),
    "rename": lambda: os.rename("/nothing", "/nowhere"),
    "unlink": lambda: os.unlink("/nothing"),
    "look": lambda: os.stat("/"),
    "mkdir": lambda: os.mkdir("/"),
}}
for kind, call in calls.items():
    if os.fork():
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code != 38:
            print(kind, code)
        continue
    os.close(install_filter([kind]))  # nobody answers, so that calls fail with ENOSYS
    try:
        call()
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_blocks_are_found_in_files_of_any_form(tmp_path: Path) -> None:
    one = os.urandom(4096)
    other = os.urandom(4096)
    (tmp_path / "slots").write_bytes(b"head" * 9 + one + b"next" + other + b"tail")
    (tmp_path / "index").write_bytes(b"index")
    found = places.find(tmp_path, {1: one, 2: other, 3: os.urandom(4096)})
    assert {*found} == {1, 2}
    assert (found[1].offset, found[1].nbytes, found[1].before, found[1].after) == (36, 4096, 36, 0)
    assert (found[2].before, found[2].after) == (4, 4)
    assert places.others_of(tmp_path, found) == [tmp_path / "index"]
    places.swap(found[1], found[2], False)
    assert places.read(tmp_path / "slots", 36, 4096) == other


def test_terms_name_the_folder_anywhere() -> None:
    terms = {"a": ["{folder}/x"], "b": {"c": "{folder}"}, "d": 3}
    assert filled(terms, "/f") == {"a": ["/f/x"], "b": {"c": "/f"}, "d": 3}


def test_an_object_of_no_family() -> None:
    with pytest.raises(Unknown, match="Expected a secondary tier"):
        family_of(3)


def test_a_tier_that_fails_without_a_fault_is_not_judged() -> None:
    with (
        Template(UNCHECKED, {"folder": "{folder}/nowhere"}, NBYTES) as template,
        pytest.raises(Unavailable, match="Expected a tier that brings back what it stored"),
    ):
        run_faults(template, [], NBYTES, DEADLINE)


def test_a_report_stands_until_it_is_changed() -> None:
    name = FAULTS[0].name
    made_report = made([row(CONTROL), row(name, "wrong bytes")], (name,))
    text = made_report.document()
    assert report.is_report(text)
    assert report.flaws(text) == []
    assert TierReport.read(text) == made_report
    assert report.flaws(text.replace("wrong bytes", "right"))[0].startswith("The report was chang")
    assert "rows of the installed suite" in report.flaws(made([row(CONTROL)]).document())[0]
    odd = made([row(CONTROL), row(name, "fine")], (name,))
    assert "got fine" in report.flaws(odd.document())[0]
    assert report.flaws("{}") == [
        f"Expected a report of schema {report.SCHEMA!r}, got another document."
    ]


def test_a_part_of_the_table_is_named_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands with the exit code of a backend's incomplete report, and is never a whole one."""
    names = [fault.name for fault in FAULTS]
    part = f"part, 2 of {len(names)} faults"
    some = made([row(CONTROL), *map(row, names[:2])], tuple(names[:2]))
    whole = made([row(CONTROL), *map(row, names)])
    named = made([row(CONTROL), *map(row, names)], tuple(names))  # each fault by its name
    assert report.part(some) == part
    assert report.part(whole) == report.part(named) == ""
    assert report.sentence(some).startswith(f"{part}: ")
    assert report.sentence(whole).startswith(f"{len(names)} faults: ")
    for name, each in {"some": some, "whole": whole}.items():
        now = replace(each, source_sha256=source.tier_sha256("disk")).seal()
        (tmp_path / f"{name}.json").write_text(now.document(), encoding="utf-8")
    assert main(["verify", str(tmp_path / "some.json")]) == 0
    assert part in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "whole.json")]) == 0
    assert "part, " not in capsys.readouterr().out
    rows = report.totals_table(tmp_path, "").splitlines()[2:]
    assert [part in each for each in rows] == [True, False]


def test_a_report_expires_with_the_source_of_its_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "expiring"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    tier = package / "tier.py"
    tier.write_text("class Tier: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "expiring.tier:Tier"
    request = Request(name, None, (FAULTS[0].name,))
    rows = [row(CONTROL), row(FAULTS[0].name)]
    now = replace(made(rows), request=request, source_sha256=source.tier_sha256(name)).seal()
    file = tmp_path / "tier.json"
    file.write_text(now.document(), encoding="utf-8")
    assert main(["verify", str(file)]) == 0
    tier.write_text("class Tier: what = 1\n", encoding="utf-8")
    assert report.flaws(file.read_text(encoding="utf-8")) == []  # it can be replayed
    assert main(["verify", str(file)]) == 1
    assert f"has expired: the source of {name} is another" in capsys.readouterr().out
    assert "| expired |" in report.totals_table(tmp_path, "")
    older = replace(now, schema=report.WITHOUT_SOURCE, source_sha256="").seal()
    assert report.flaws(older.document()) == []
    assert "has expired" in report.expired(older)
    tier.unlink()  # a tier that is not installed here
    assert main(["verify", str(file)]) == 0


def test_the_source_of_a_tier_is_what_its_store_consists_of() -> None:
    """Modules that the tier imports count, in turn; those that it does not import do not."""
    names = {*source.counted("portakv.storage.tiers.disk")}
    assert {"portakv.storage.tiers.disk", "portakv.storage.image", "portakv.storage.work"} <= names
    assert not any(name.startswith(("portakv.serving", "portakv.copy")) for name in names)
    lmcache = {*source.counted("portakv.integrations.lmcache_l2")}
    assert {"portakv.integrations.lmcache_l2", "portakv.serving.pages"} <= lmcache
    assert "portakv.integrations.vllm_tier" not in lmcache
    assert source.tier_sha256("disk") != source.tier_sha256("portakv.serving.pages:PageStore")
    assert source.tier_sha256("another") == source.tier_sha256("nowhere:Tier") == ""


def test_only_wrong_bytes_and_hangs_end_with_1() -> None:
    for outcome in ("error", "miss", "right", "not injected"):
        assert command.exit_code(made([row("x", outcome)])) == 0
    for outcome in BAD:
        assert command.exit_code(made([row("x", outcome)])) == 1


def test_the_command_writes_a_report_that_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tier.json"
    name = "two blocks swapped, open"
    words = ["--tier", UNCHECKED, "--only", name, "--report", str(file)]
    assert main(words) == 1
    assert "2 of 8 blocks wrong" in capsys.readouterr().out
    assert main(["verify", str(file)]) == 0
    assert (
        f"stands: {UNCHECKED}, part, 1 of {len(FAULTS)} faults: 1 wrong" in capsys.readouterr().out
    )
    text = file.read_text()
    made_report = TierReport.read(text)
    rows = [made_report.rows[0], made_report.rows[1]._replace(outcome="right")]
    other = tmp_path / "other.json"
    other.write_text(replace(made_report, rows=rows).seal().document())
    assert main(["replay", str(other)]) == 1
    assert f"{name}: right -> wrong bytes" in capsys.readouterr().out
    assert main(["diff", str(other), str(file)]) == 1
    assert main(["diff", str(file), str(other)]) == 0
    assert json.loads(text)["rows"][1]["replay"].endswith(f"--only '{name}'")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere:Tier"], 3, "ModuleNotFoundError"),
        (["disk", "--only", "pigeons"], 2, "Expected the beginning of a fault's name"),
        (["--replay", "/nothing"], 2, "cannot be read"),
    ],
)
def test_a_command_that_cannot_run(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--tier", *words]) == code
    assert says in capsys.readouterr().err


#: PortaKV's own tiers that need no engine.
OWN: dict[str, tuple[str, dict[str, Any] | None]] = {
    "disk": ("disk", None),
    "remote": ("remote", None),
    "host": ("portakv.serving.pages:PageStore", {"host": 32 << 20, "staging": 16 << 20}),
    "store": ("portakv.serving.pages:PageStore", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_no_fault_makes_portakv_deliver_wrong_bytes(name: str) -> None:
    tier, terms = OWN[name]
    made_report = command.run(Request(tier, terms), jobs=4)
    assert [row for row in made_report.rows if row.outcome in BAD] == []


@pytest.mark.slow
def test_the_whole_table_over_a_tier_without_checks() -> None:
    made_report = command.run(Request(UNCHECKED, deadline=5.0), jobs=4)
    assert made_report.totals["wrong bytes"] > 30
    assert [row.fault for row in made_report.rows if row.outcome == "hang"] == [
        "hang of reads",
        "hang of the first writes",
        "hang of later writes",
    ]


RESULTS = sorted((Path(command.__file__).parents[1] / "tiers").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_each_committed_report_stands_without_wrong_bytes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert report.flaws(text) == []
    assert report.part(TierReport.read(text)) == ""
    assert TierReport.read(text).totals["wrong bytes"] == 0
