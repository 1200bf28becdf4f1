# SPDX-License-Identifier: Apache-2.0
"""Waivers are strict: a form that is checked, an expiry, CORE never, and never for what passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import support.conform_fake_worker as fake
from support.conform_fake_worker import CLAIM, CORE

from portakv_conformance import SUITE_VERSION, cli
from portakv_conformance.evidence.verdict import why_no_rung
from portakv_conformance.judge.waivers import Waiver, WaiverError, judged, problems, read_waivers
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.runner import Options, run

LATER, NOW = "2999.01", SUITE_VERSION
GOOD = f"""
[[waiver]]
id = "{CLAIM}a"
reason = "Ticket 4711."
expires = "{LATER}"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "waivers.toml"
    file.write_text(text, encoding="utf-8")
    return file


def waived(*ids: str, expires: str = LATER) -> tuple[Waiver, ...]:
    return tuple(Waiver(id, "Ticket 4711.", expires) for id in ids)


def ran(behaviours: dict[str, str], *waivers: Waiver, **options: object) -> RunRecord:
    wanted = Options("fake", waivers=waivers, **options)  # type: ignore[arg-type]
    return run(wanted, command=fake.command(behaviours))


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    both = GOOD + GOOD.replace(CLAIM + "a", CLAIM + "b").replace(LATER, "3000")
    assert read_waivers(written(tmp_path, both)) == (
        Waiver(CLAIM + "a", "Ticket 4711.", LATER), Waiver(CLAIM + "b", "Ticket 4711.", "3000"),
    )  # fmt: skip
    assert read_waivers(written(tmp_path, "")) == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + 'ticket = "4711"\n', "unknown key 'ticket'"),
        ('title = "mine"\n' + GOOD, "unknown key 'title'"),
        ("[waivers]\n", "unknown key 'waivers'"),
        (GOOD.replace("[[waiver]]", "[waiver]"), "not a list"),
        (GOOD.replace('reason = "Ticket 4711."\n', ""), "no 'reason'"),
        (GOOD.replace("Ticket 4711.", " "), "no 'reason'"),
        (GOOD.replace(f'id = "{CLAIM}a"\n', ""), "no 'id'"),
        (GOOD.replace(f'expires = "{LATER}"\n', ""), "no 'expires'"),
        (GOOD.replace(f'"{LATER}"', "2999.01"), "no 'expires'"),
        (GOOD.replace(LATER, "next year"), "no version"),
        (GOOD + GOOD, "2 times"),
        ("[[waiver]\n", "no TOML"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(WaiverError, match=told.replace("[", r"\[")):
        read_waivers(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WaiverError, match="cannot be read"):
        read_waivers(tmp_path / "nothing.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(WaiverError, match="cannot be read"):
        read_waivers(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("how", "id", "expires", "status", "told"),
    [
        ("fail", CLAIM + "a", LATER, "waived", "Ticket 4711. (What it showed: Byte 3 is 7"),
        ("crash", CLAIM + "a", LATER, "waived", "SIGSEGV"),
        ("pass", CLAIM + "a", LATER, "failed", "remove the waiver"),
        ("not-claimed", CLAIM + "a", LATER, "failed", "remove the waiver"),
        ("error", CLAIM + "a", LATER, "error", ""),
        ("fail", CORE + "a", LATER, "failed", "CORE cannot be waived"),
        *(("fail", CLAIM + "a", expires, "failed", f"expired in suite {expires}")
          for expires in (NOW, f"{NOW}.0", "2020.01", "1")),
    ],
)  # fmt: skip
def test_a_waived_case(how: str, id: str, expires: str, status: str, told: str) -> None:
    """A failure or a crash is waived, of no CORE case and until its waiver expires; it proves no
    rung. What passes, or is not claimed, fails."""
    record = ran({id: how, CLAIM + "b": "pass"}, *waived(id, expires=expires), profile="full")
    assert [case.status for case in record.cases] == [status, "passed"]
    assert told in record.cases[0].reason
    conformant = "conformant" if status == "waived" else "failed"
    assert (record.verdict, record.rung) == (conformant, "")
    assert ("cases are waived" in why_no_rung(record)) == (status == "waived")
    assert record.waivers == [{"id": id, "reason": "Ticket 4711.", "expires": expires}]


def test_an_expiry_is_compared_as_numbers() -> None:
    case = CaseRecord("a", "claims", "core", status="failed", reason="Wrong.")
    assert judged(case, Waiver("a", "why", "2026.9"), "2026.11").status == "failed"
    assert judged(case, Waiver("a", "why", "2026.12"), "2026.11").status == "waived"


def test_an_unknown_id_fails_a_run_in_which_all_is_well() -> None:
    record = ran({CORE + "a": "pass"}, *waived("cases/test_claims.py::test_gone"))
    assert (record.verdict, record.totals["failed"]) == ("failed", 0)
    (told,) = problems(record.waivers, record.cases, NOW, whole=True)
    assert "no case of this run has that id" in told
    # One that expired besides is told twice.
    assert len(problems([Waiver("x", "why", "1").plain()], [], NOW, whole=True)) == 2


def test_a_waived_failure_is_no_first_failure() -> None:
    behaviours = {CLAIM + "a": "fail", CLAIM + "b": "fail", CLAIM + "c": "pass"}
    record = ran(behaviours, *waived(CLAIM + "a"), exit_first=True)
    assert [case.status for case in record.cases] == ["waived", "failed"]


def test_waivers_are_strict_where_only_some_cases_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A waiver that does not hold fails these too, though its case is not among them."""
    behaviours = {CORE + "a": "pass", CLAIM + "a": "fail", CLAIM + "b": "pass"}
    monkeypatch.setattr(cli, "run", partial(run, command=fake.command(behaviours)))
    words = ["fake", "--device", "cpu", "--only", CORE + "a", "--waivers"]
    assert cli.main([*words, str(written(tmp_path, GOOD))]) == 0
    assert cli.main([*words, str(written(tmp_path, GOOD.replace(LATER, NOW)))]) == 1
    assert f"expired in suite {NOW}" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*words, str(written(tmp_path, GOOD.replace(CLAIM + "a", "cases/gone")))]) == 2
    assert "A waiver names 'cases/gone', but no case" in capsys.readouterr().err
