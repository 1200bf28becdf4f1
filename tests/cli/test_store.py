# SPDX-License-Identifier: Apache-2.0
"""`portakv store` and `portakv explain --storage`."""

from __future__ import annotations

import dataclasses
import errno
import io
import mmap
import os
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import run, run_json

from portakv.cli import store
from portakv.storage import image
from portakv.storage.form import BlockForm
from portakv.storage.io.base import Request
from portakv.storage.io.choose import choose
from portakv.storage.tiers.folder import Slots

FORM = BlockForm(
    "m", "float16", 2, (64, 64), 16, (0, 4, 4), (0, 4, 4), "block layer head kv token dim"
)
OTHER = BlockForm(
    "m", "float16", 2, (64, 64), 32, (0, 4, 4), (0, 4, 4), "block layer head kv token dim"
)
SLOTS = 9
ALLOCATED = (1 << 20) // OTHER.image_bytes  # at the first save
ROOM = SLOTS * FORM.image_bytes


def fill(folder: Path, form: BlockForm = FORM, blocks: int = 5) -> None:
    """A store of a form with some blocks in a folder."""
    row = np.frombuffer(mmap.mmap(-1, form.image_bytes), np.uint8)
    size = SLOTS * form.image_bytes
    with (
        closing(choose()[0]) as engine,
        closing(Slots(folder / form.name, form, size, engine)) as s,
    ):
        for number in range(1, blocks + 1):
            key = bytes([number]) * 32
            row[image.HEADER :] = number
            sums = image.seal(row, form, key, number)
            slot = s.take(key)
            assert slot is not None
            at = slot * s.form.image_bytes
            assert engine.run([Request(s.fd, at, row.ctypes.data, len(row), True)]) == [len(row)]
            s.seal(slot, key, number, sums)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


def spoil(folder: Path, offset: int, form: BlockForm = FORM) -> None:
    """Flip a bit of the image in the middle."""
    with (folder / form.name / "slots").open("r+b") as file:
        file.seek(2 * form.image_bytes + offset)
        was = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([was[0] ^ 1]))


def test_show_tells_each_form_in_the_folder(folder: Path) -> None:
    fill(folder, OTHER, 2)
    stores = {one["form"]: one for one in run_json("store", "show", str(folder))["stores"]}
    assert {name: one["used"] for name, one in stores.items()} == {FORM.name: 5, OTHER.name: 2}
    one = stores[OTHER.name]
    assert (one["slots"], one["open_in"], one["block_size"]) == (ALLOCATED, "-", 32)
    assert one["bytes"] >= ALLOCATED * OTHER.image_bytes
    output = run("store", "show", str(folder)).out
    assert re.search(rf"{OTHER.name[:8]} +m +float16 +4 +4 +32 +2 +{ALLOCATED} ", output)
    assert FORM.name[:8] in output
    assert "open in" not in output


@pytest.mark.parametrize("action", ["show", "check"])
def test_forms_that_are_packed_say_so(
    folder: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without such a form there is no column for it."""
    monkeypatch.setenv("COLUMNS", "120")
    assert "encoding" not in run("store", action, str(folder)).out
    fill(folder, dataclasses.replace(OTHER, dtype="bfloat16", encoding="pack/1:4"), 1)
    lines = run("store", action, str(folder)).out.splitlines()
    column = lines[0].split().index("encoding")
    assert {line.split()[column] for line in lines[2:]} == {"raw", "pack/1:4"}


@pytest.mark.parametrize("width", [80, 120])
def test_show_says_what_a_form_is(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a model differ by what a person knows of them; only the model's name is folded."""
    for heads in ((0, 4, 8), (4, 8, 8)):
        part = dataclasses.replace(FORM, model="org/a-model-of-8B@" + 8 * "0", heads=heads)
        fill(tmp_path, part, 1)
    with closing(choose()[0]) as engine, closing(Slots(tmp_path / FORM.name, FORM, ROOM, engine)):
        monkeypatch.setenv("COLUMNS", str(width))
        output = run("store", "show", str(tmp_path)).out
    lines = output.splitlines()
    assert max(map(len, lines)) <= width
    for part_of_heads in ("0-3 of 8", "4-7 of 8"):
        assert sum(part_of_heads in line and "float16" in line for line in lines) == 1
    assert lines[-1] == f"The folder is open in process {os.getpid()}."


def test_show_follows_no_link_and_waits_for_no_pipe(folder: Path, tmp_path: Path) -> None:
    """A link or a pipe takes the place of the locked file."""
    lock = folder / "lock"
    for kind in ("link", "pipe"):
        lock.unlink()
        if kind == "link":
            lock.symlink_to(tmp_path / "elsewhere")
        else:
            os.mkfifo(lock)
        ran = run("store", "show", str(folder))
        assert ran.code == 1
        assert "regular file, got a" in ran.out


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("action", ["show", "check"])
def test_something_else_in_place_of_the_slots(folder: Path, action: str, kind: str) -> None:
    slots = folder / FORM.name / "slots"
    elsewhere = slots.rename(folder / "elsewhere")
    if kind == "link":
        slots.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(slots)
    else:
        slots.mkdir()
    ran = run("store", action, str(folder))
    assert (ran.code, ran.err) == (1, "")
    assert f"Expected {slots} to be a regular file, got a" in ran.out


@pytest.mark.parametrize("action", ["show", "check", "wipe"])
def test_a_link_in_place_of_a_form(folder: Path, tmp_path: Path, action: str) -> None:
    place = folder / FORM.name
    elsewhere = place.rename(tmp_path / "elsewhere")
    before = {file: file.read_bytes() for file in elsewhere.iterdir()}
    place.symlink_to(elsewhere)
    ran = run("store", action, str(folder), *(["--yes"] if action == "wipe" else []))
    assert (ran.code, ran.err) == (1, "")
    assert f"Expected {place} to be a directory, got a symbolic link" in ran.out
    assert {file: file.read_bytes() for file in elsewhere.iterdir()} == before
    assert place.is_symlink()


@pytest.mark.parametrize(
    ("offset", "why"),
    [
        (None, ""),
        (100, "broken seal"),
        (5000, "its payload does not match its checksums"),
    ],
)
def test_check_verifies_every_image(folder: Path, offset: int | None, why: str) -> None:
    """Faults 1 and 2, found by a person: exit code 1, and which block it is."""
    fill(folder, OTHER, 1)
    if offset is not None:
        spoil(folder, offset)
    ran = run("store", "check", str(folder))
    assert ran.code == (1 if why else 0)
    assert (why in ran.out, "slot 2" in ran.out) == (True, bool(why))
    assert "010101010101" not in ran.out  # no key in full


def test_a_store_that_is_open_is_shown_and_neither_checked_nor_wiped(folder: Path) -> None:
    """Fault 12. The sentence names the process."""
    with closing(choose()[0]) as engine, closing(Slots(folder / FORM.name, FORM, ROOM, engine)):
        stores = run_json("store", "show", str(folder))["stores"]
        ran = [run("store", *words, str(folder)) for words in (["check"], ["wipe", "--yes"])]
    assert stores[0]["open_in"] == f"process {os.getpid()}"
    for code, out, err in ran:
        assert (code, out) == (1, "")
        assert "this process has open already" in err
    assert run("store", "check", str(folder)).code == 0


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("", False), ("--yes", True)])
def test_wipe_asks_and_leaves_what_is_not_a_store(
    folder: Path, answer: str, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "notes").mkdir()
    (folder / FORM.name / "form.json").write_text("of another release")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    ran = run("store", "wipe", str(folder), *(["--yes"] if answer == "--yes" else []))
    assert ran.code == (0 if gone else 1)
    assert ((folder / FORM.name).exists(), (folder / "notes").exists()) == (not gone, True)
    assert ("[y/N]" in ran.err) == (answer != "--yes")


WORDS = [
    ["store", "check"],
    ["store", "show"],
    ["store", "wipe", "--yes"],
    ["explain", "--storage"],
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nothing", "there is no such folder"),
        ("file", "that is not a folder"),
        ("closed", "this user may not use"),
        ("s3://bucket/kv", "List a remote tier with the tools of its provider"),
    ],
)
def test_what_is_no_folder_is_a_sentence(
    words: list[str], what: str, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its own; nothing is made."""
    (folder / "file").touch()
    (folder / "closed").mkdir()
    where = what if "://" in what else str(folder / what)
    real = os.listdir

    def listdir(place: Any) -> list[str]:  # root may look everywhere
        if str(place) == where:
            raise PermissionError(errno.EACCES, "Permission denied", where)
        return real(place)

    if what == "closed":
        monkeypatch.setattr(os, "listdir", listdir)
    code, out, err = run(*words, where)
    assert (code, out) == (1, "")
    assert where in err
    assert why in err
    assert {x.name for x in folder.iterdir()} == {FORM.name, "lock", "file", "closed"}


def test_explain_of_a_folder_that_takes_no_files() -> None:
    """The folder is there: the sentence says what fails."""
    err = run("explain", "--storage", "/proc").err
    assert "no such folder" not in err
    assert "/proc" in err


@pytest.mark.parametrize("words", WORDS[:3])
def test_a_folder_without_stores_is_a_sentence(words: list[str], tmp_path: Path) -> None:
    assert "got none" in run(*words, str(tmp_path)).err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words", [*WORDS[:2], WORDS[3]])
@pytest.mark.parametrize("harm", ["another format", "no form", "no slots"])
def test_a_form_that_cannot_be_read_is_a_row_with_the_reason(
    words: list[str], harm: str, folder: Path
) -> None:
    """The command reports the other forms as before."""
    fill(folder, OTHER, 2)
    bad = folder / FORM.name
    if harm == "another format":
        (bad / "form.json").write_text('{"format": 99}')
    else:
        (bad / ("form.json" if harm == "no form" else "slots")).unlink()
    if harm == "no slots" and words[1] == "check":
        return  # which are made anew, empty
    ran = run(*words, str(folder))
    assert (ran.code, ran.err) == (int(words[0] == "store"), "")
    why = "of format 1, got format 99" if harm == "another format" else "but it does not exist"
    assert re.search(rf"{FORM.name}, .*{why}", ran.out)
    assert re.search(rf"{OTHER.name[:8]} .* 2 +{ALLOCATED} ", ran.out)


def test_a_form_is_named_by_the_digits_that_are_shown(folder: Path) -> None:
    fill(folder, OTHER, 2)
    shown = run("store", "show", str(folder / OTHER.name[:8]))
    assert (shown.code, shown.err) == (0, "")
    assert OTHER.name[:8] in shown.out
    assert FORM.name[:8] not in shown.out
    assert run("store", "wipe", str(folder / OTHER.name[:8]), "--yes").code == 0
    assert not (folder / OTHER.name).exists()
    assert (folder / FORM.name).exists()
    assert "there is no such folder" in run("store", "wipe", str(folder / ("0" * 8)), "--yes").err


def test_wipe_of_one_form_leaves_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, OTHER, 2)
    monkeypatch.chdir(folder / FORM.name)
    assert run("store", "wipe", "--yes", ".").code == 0
    assert {x.name for x in folder.iterdir()} == {OTHER.name, "lock"}
    assert run("store", "wipe", "--yes", str(folder)).code == 0
    assert not [*folder.iterdir()]


def test_show_counts_blocks_that_a_store_would_find(folder: Path) -> None:
    """Not records that are torn, or below another's slot."""
    path = folder / FORM.name / "table"
    table = bytearray(path.read_bytes())
    table[40] ^= 1
    table[256:512] = table[512:768]
    path.write_bytes(table)
    assert run_json("store", "show", str(folder))["stores"][0]["used"] == 3


def test_ctrl_c_is_told_without_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    code, out, err = run("store", "wipe", str(folder))
    assert (code, out, err.splitlines()[1:]) == (130, "", ["portakv: interrupted"])
    assert (folder / FORM.name / "slots").exists()


def test_check_shows_a_bar_if_it_takes_longer_than_a_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(store, "LATE", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    (folder / FORM.name / "table").unlink()  # so that headers are read, too
    fill(folder, OTHER, 2)
    for action in ("check", "wipe"):
        assert store.run(_arguments(action, folder)) == 0
    for what in ("records", "headers", "checking", "wiping"):
        assert what in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def _arguments(action: str, folder: Path) -> Any:
    from argparse import Namespace

    return Namespace(action=action, folder=[str(folder)], yes=True, json=False)


@pytest.mark.parametrize("engine", ["", "threads"])
def test_explain_tells_how_a_folder_is_read(
    engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine:
        monkeypatch.setenv("PORTAKV_IO", engine)
    report = run_json("explain", "--storage", str(folder))
    accepted = {one["name"]: one["accepted"] for one in report["engines"]}
    assert accepted[report["engine"]]
    assert not engine or report["engine"] == engine
    assert (report["alignment"], report["free"] > 0) == (4096, True)
    assert [one["used"] for one in report["stores"]] == [5]
    output = run("explain", "--storage", str(folder)).out
    assert f"{report['engine']} serves" in output
    assert {path.name for path in folder.iterdir()} == {FORM.name, "lock"}
