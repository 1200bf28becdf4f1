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


def test_a_failure_that_is_waived_leaves_the_run_conformant() -> None:
    record = ran({CORE + "a": "pass", CLAIM + "a": "fail"}, *waived(CLAIM + "a"), profile="full")
    assert (record.verdict, record.totals["waived"], record.totals["failed"]) == (
        "conformant",
        1,
        0,
    )
    assert record.cases[1].status == "waived"
    assert "Ticket 4711." in record.cases[1].reason
    assert "Byte 3 is 7" in record.cases[1].reason
    assert record.waivers == [{"id": CLAIM + "a", "reason": "Ticket 4711.", "expires": LATER}]


def test_what_is_waived_proves_no_rung() -> None:
    assert ran({CLAIM + "a": "pass"}, profile="full").rung == "R6"
    record = ran({CLAIM + "a": "fail"}, *waived(CLAIM + "a"), profile="full")
    assert record.rung == ""
    assert "waived" in why_no_rung(record)


@pytest.mark.parametrize("how", ["pass", "not-claimed"])
def test_a_waived_case_that_does_not_fail_fails_the_run(how: str) -> None:
    record = ran({CLAIM + "a": how}, *waived(CLAIM + "a"))
    assert (record.verdict, record.cases[0].status) == ("failed", "failed")
    assert "remove the waiver" in record.cases[0].reason


def test_a_waiver_that_expired_does_not_hold() -> None:
    for expires in (NOW, f"{NOW}.0", "2020.01", "1"):
        record = ran({CLAIM + "a": "fail"}, *waived(CLAIM + "a", expires=expires))
        assert (record.verdict, record.cases[0].status) == ("failed", "failed")
        assert f"expired in suite {expires}" in record.cases[0].reason


def test_an_expiry_is_compared_as_numbers() -> None:
    case = CaseRecord("a", "claims", "core", status="failed", reason="Wrong.")
    assert judged(case, Waiver("a", "why", "2026.9"), "2026.11").status == "failed"
    assert judged(case, Waiver("a", "why", "2026.12"), "2026.11").status == "waived"


def test_core_cannot_be_waived() -> None:
    record = ran({CORE + "a": "fail"}, *waived(CORE + "a"))
    assert (record.verdict, record.cases[0].status) == ("failed", "failed")
    assert "CORE cannot be waived" in record.cases[0].reason


def test_an_unknown_id_fails_a_run_in_which_all_is_well() -> None:
    record = ran({CORE + "a": "pass"}, *waived("cases/test_claims.py::test_gone"))
    assert (record.verdict, record.totals["failed"]) == ("failed", 0)
    assert (
        "no case of this run has that id"
        in problems(record.waivers, record.cases, NOW, whole=True)[0]
    )


def test_an_expired_waiver_of_what_is_unknown_is_told_twice() -> None:
    told = problems([Waiver("x", "why", "1").plain()], [], NOW, whole=True)
    assert len(told) == 2


def test_an_error_of_the_suite_cannot_be_waived() -> None:
    record = ran({CLAIM + "a": "error"}, *waived(CLAIM + "a"))
    assert (record.verdict, record.cases[0].status) == ("failed", "error")


def test_a_crash_can_be_waived() -> None:
    record = ran({CLAIM + "a": "crash", CLAIM + "b": "pass"}, *waived(CLAIM + "a"))
    assert [case.status for case in record.cases] == ["waived", "passed"]
    assert record.verdict == "conformant"


def test_a_waived_failure_is_no_first_failure() -> None:
    behaviours = {CLAIM + "a": "fail", CLAIM + "b": "fail", CLAIM + "c": "pass"}
    record = ran(behaviours, *waived(CLAIM + "a"), exit_first=True)
    assert [case.status for case in record.cases] == ["waived", "failed"]


def test_ids_beyond_those_asked_for_are_not_judged() -> None:
    record = ran(
        {CORE + "a": "pass", CLAIM + "a": "fail"}, *waived(CLAIM + "a"), only=(CORE + "a",)
    )
    assert (record.verdict, record.totals["failed"]) == ("incomplete", 0)


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
