# SPDX-License-Identifier: Apache-2.0
"""The command line: the command itself and every verb but `explain`, plain and as JSON, with rich
and without, and its errors."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from subprocess import PIPE
from types import ModuleType
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from support import ready
from support.command_line import Absent, Shy, registered, run, run_json
from support.small_backends import small_backend, wipe

import portakv
from portakv.cli import main
from portakv.cli.layouts import draw
from portakv.cli.sides import read_bytes
from portakv.layout.presets import PRESETS
from portakv.registry.registry import REGISTRY
from portakv.runtime.devices import devices_present

# the command itself


def test_no_words_print_help_and_an_option_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run()
    assert code == 0
    for verb in ("demo", "doctor", "backends", "explain", "layouts", "bench"):
        assert f"\n    {verb} " in out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"portakv {portakv.__version__}\n"


def test_an_interrupt_while_torch_is_imported_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, portakv_command; sys.exit(portakv_command.main())"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=PIPE,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (130, "portakv: interrupted\n")


#: Lines that the parser refuses, and words of why.
NOT_UNDERSTOOD = {
    "nonsense": "invalid choice",
    "explian": "Did you mean 'explain'?",
    "layouts epd opaque": "opaque",
    "backends cpu": "portakv backends: error: unrecognized arguments: cpu",
    "doctor cpu": "`portakv doctor --help` lists all options.",
    "demo foo": "portakv demo: error: unrecognized arguments: foo",
    "bench --nope": "portakv bench: error: unrecognized arguments: --nope",
    "conform cpu --nope": "portakv conform: error: unrecognized arguments: --nope",
    "backends --device": "expected one argument",
    "explain": "SRC_LAYOUT, DST_LAYOUT",
    "explain epd": "SRC_LAYOUT, DST_LAYOUT",
    "explain epd epd --dim 0": "--dim",
    "explain epd epd --dim 1,x": "--dim",
    "explain epd epd --block-size 1,2,3": "--block-size",
    "explain epd epd --layers 1.5": "--layers",
    "explain epd epd --src-step -1": "--src-step",
    "explain epd epd --index rows": "--index",
    "explain epd epd --dtype float17": "--dtype",
    "explain epd epd --dtype manual_seed": "--dtype",
    "demo --store x": "portakv demo: error: unrecognized arguments: --store x",
    "explain epd epd --run-bytes 1K": "--run-bytes goes with --host",
    "explain epd epd --pageable": "--pageable goes with --host",
    "explain --host epd epd": "--host takes no layouts",
    "explain --host --blocks 3 --payload 1M": "--payload goes without --blocks",
    "explain --host --run-bytes 0": "expected bytes above 0",
    "explain --host --max-gbps 0": "above 0",
    "explain --host --max-gbps nan": "above 0",
    "explain --host --max-thread-blocks 0": "expected a number above 0",
    "explain --host --direction up": "invalid choice",
    "explain --host --overlap both": "invalid choice",
    "explain --host --table nope": "expected a table in nope, but it cannot be read (No such",
    "explain --host --table /dev/null": "pass a file of `portakv calibrate`",
    "calibrate --seconds=0": "expected seconds above 0",
    "calibrate --seconds soon": "expected seconds above 0",
    "calibrate --seconds nan": "expected seconds above 0",
    "calibrate --seconds inf": "expected seconds above 0",
    "warmup --arch x": "--arch",
    "warmup --arch 900000": "--arch",
    "warmup --arch gfx": "--arch",
    "warmup --layout epd": "--layout",
}


@pytest.mark.parametrize("line", NOT_UNDERSTOOD)
def test_what_is_not_understood_ends_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    first, *more = captured.err.splitlines()
    assert ": error: " in first
    assert len(more) == 1  # which command lists the options
    assert NOT_UNDERSTOOD[line] in captured.err


#: Lines that are understood and cannot be obeyed, and words of the sentence that says why.
REFUSED = {
    "backends --device nonsense": "name one of cpu, cuda, mlu, npu, or cuda:1.",
    "backends --device gpu": "did you mean 'cuda'?",
    "backends --device CPU": "did you mean 'cpu'?",
    "backends --device hip:1": "torch calls hip devices cuda; did you mean 'cuda:1'?",
    "backends --device=": "name one of cpu, cuda, mlu, npu, or cuda:1.",
    "backends --device cuda:x": "did you mean 'cuda'?",
    "layouts sglang-mhaa": "sglang-mha",
    "demo --device nonsense": "got 'nonsense': torch cannot use it here",
    "explain 'layer | blok token dim' epd": "Unknown axis 'blok'",
    "explain vllm-nh epd": "Near names: vllm-nhd",
    "explain vllm-dsa vllm-nhd": "opaque pages and rows",
    "explain vllm-dsa vllm-dsa --src-step 1": "a page moves only whole",
    "explain epd epd --dim 1,2,3": "unequal widths",
    "explain epd 'token kv (head dim)' --layers 3": "does not name 'layer'",
    "explain vllm-mla-fp8 epd --dim 128": "Expected dim=656 for preset",
    "explain vllm-ascend-nz epd --dim 33": "divides, got 33",
    "explain epd epd --device nonsense": "torch cannot use it here",
    "explain epd epd --device meta": "no memory",
    "explain epd epd --backend nonsense": "no such backend",
    "explain epd epd --blocks 10000000000000": "could not be made",
    "explain epd epd --blocks 100000000000000000000": "could not be made",
    "explain --host --device nonsense": "torch cannot use it here",
}


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_obeyed_ends_with_a_sentence(line: str, option: list[str]) -> None:
    code, out, err = run(*shlex.split(line), *option)
    assert (code, out) == (1, "")
    assert err.startswith("portakv: ")
    assert REFUSED[line] in err


@pytest.mark.parametrize("line", ["demo", "explain epd epd"])
def test_unknown_names_say_where_the_trace_is(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "nonsense")
    code, out, err = run(*line.split())
    assert (code, out) == (1, "")
    assert "'nonsense', which is forced" in err
    assert "to serve cpu, but it cannot: no such backend; known are cuda, hip," in err
    assert "portakv backends --device cpu" in err


def test_the_help_imports_no_extra_a_picture_needs_no_unicode_and_a_reader_may_go() -> None:
    code = (
        "import sys; sys.stdout.reconfigure(encoding='ascii'); "
        "from portakv.cli import main; main([]); "
        "more = {'rich', 'transformers', 'matplotlib', 'portakv_benchmarks'}; "
        "assert not more & set(sys.modules); main(['layouts', 'vllm-nhd']); print('end'); "
        "sys.stdout.flush(); input(); sys.exit(main(['layouts', '--json']))"
    )
    with ready.Python("-c", code, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        stdin: Any = process.stdin
        stdout: Any = process.stdout
        stderr: Any = process.stderr
        output = b"".join(takewhile(b"end\n".__ne__, stdout)).decode()
        stdout.close()
        stdin.write(b"\n")
        stdin.close()
        err = stderr.read()
    assert "kv_caches[layer][kv, block, token, head, dim]" in output, err
    assert (process.returncode, err) == (1, b"")


# portakv backends


def test_backends() -> None:
    code, out, err = run("backends")
    assert (code, err) == (0, "")
    assert f"portakv {portakv.__version__}, torch {torch.__version__}, Python " in out
    assert "PORTAKV_BACKEND is not set" in out
    row = next(line for line in out.splitlines() if line.startswith("reference"))
    assert row.split()[1] == "chosen"
    assert "on request" in next(line for line in out.splitlines() if line.startswith("compiled"))
    assert "every byte right" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_backends_as_json() -> None:
    report = run_json("backends")
    assert list(report) == ["portakv", "torch", "python", "forced", "devices"]
    assert (report["torch"], report["forced"]) == (torch.__version__, None)
    assert [d["device"] for d in report["devices"]] == [str(d) for d in devices_present()]
    cpu = report["devices"][0]
    assert list(cpu) == ["device", "name", "count", "missing", "chosen", "candidates"]
    assert (cpu["device"], cpu["count"], cpu["chosen"]) == ("cpu", 1, "reference")
    answers = {c["name"]: c["on_request"] for c in cpu["candidates"]}
    assert (answers["compiled"], answers["reference"]) == (True, False)
    assert [c["name"] for c in cpu["candidates"]] == REGISTRY.names()
    fields = ["name", "accepted", "chosen", "on_request", "reason", "verified"]
    assert list(cpu["candidates"][-1]) == fields


def test_backends_tell_why_not_the_others() -> None:
    missing = "no_such_package_anywhere:Class"
    wrong = small_backend("wrong", spoil=wipe)
    with registered(absent=Absent, broken=missing, wrong=wrong, shy=Shy):
        out = run("backends").out
    answers = dict(line.split()[:2] for line in out.splitlines() if len(line.split()) > 1)
    names = ["absent", "broken", "wrong", "shy", "reference"]
    assert [answers[name] for name in names] == [*["rejected"] * 3, "chosen", "accepted"]
    text = " ".join(out.split())
    assert "its driver [v2] is not installed" in text  # and no brackets are taken for markup
    folded = "".join(out.split())  # a narrow column breaks a long word
    assert "Nomodulenamed'no_such_package_anywhere'" in folded
    assert "its self-check failed" in text


@pytest.mark.parametrize(("name", "lacks"), [
    ("mlu:1", "torch_mlu"), ("cuda:99", "rejected"), ("mps", "mps is not here: torch cannot use"),
    ("card:1", "it is a test; it needs the device, which is not here"),
])  # fmt: skip
def test_backends_of_a_device_that_is_not_here(name: str, lacks: str) -> None:
    """With a sentence first, and what a third party's probe says of it."""
    with registered(card=small_backend("card")):
        code, out, err = run("backends", "--device", name)
    assert (code, err) == (1, f"portakv: no backend is chosen for {name}.\n")
    assert f"\n{name} is not here: torch " in out
    assert f"{name}, not here" in out
    assert lacks in " ".join(out.split())


def test_backends_under_a_forced_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    code, out, err = run("backends")
    assert (code, err) == (0, "")
    assert "PORTAKV_BACKEND=reference is set" in out
    assert run_json("backends")["forced"] == "reference"
    monkeypatch.setenv("PORTAKV_BACKEND", "nonsense")
    code, out, err = run("backends")
    assert code == 1
    assert err == "portakv: no backend is chosen for any device of this machine.\n"
    assert f"no such backend; known are {', '.join(REGISTRY.names())}" in " ".join(out.split())
    assert " chosen " not in out.replace("is chosen.", "")
    code, out, _ = run("backends", "--json")
    cpu = json.loads(out)["devices"][0]
    assert (code, cpu["chosen"]) == (1, None)
    answers = {c["name"]: c["accepted"] for c in cpu["candidates"]}
    assert list(answers) == ["nonsense", *REGISTRY.names()]
    assert (answers["nonsense"], answers["reference"]) == (False, True)


# portakv layouts


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_layouts_show_every_name_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run("layouts")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in out
    assert "…" not in out
    firsts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    shown = [name for name in firsts if name in PRESETS]
    assert sorted(shown) == sorted(PRESETS)
    numbered = [name for name in PRESETS if name.startswith("lmcache-")]
    assert shown[-len(numbered) :] == numbered
    if columns >= 100:  # wide enough for one line each
        for p in PRESETS.values():
            row = next(line for line in lines if line.split()[:1] == [p.name])
            releases = p.releases if columns == 120 else ""
            assert row.split() == f"{p.name} {p.layout} {p.engine} {releases}".split()
    assert f"{len(PRESETS)} layouts." in out


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("32768", 32768),
        ("7B", 7),
        ("2KB", 2000),
        ("2 kb", 2000),
        ("2KiB", 2048),
        ("2K", 2048),
        ("3MB", 3_000_000),
        ("3MiB", 3 * 1048576),
        ("2GB", 2_000_000_000),
        ("2GiB", 2 * 1073741824),
        ("2G", 2 * 1073741824),
        ("1TB", 1_000_000_000_000),
        ("1tib", 1099511627776),
    ],
)
def test_bytes_have_the_units_of_their_names(text: str, nbytes: int) -> None:
    assert read_bytes(text, least=0) == nbytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5G", "2GiBs", "2PB", "2 Gi B", "G"])
def test_bytes_of_another_unit_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 32768, 64MB or 64MiB"):
        read_bytes(text)


def test_a_run_of_gigabytes_is_that_of_the_name() -> None:
    report = run_json("explain", "--host", "--run-bytes", "2GB", "--device", "cpu")
    assert report["bytes"] == 2_000_000_000


def test_layouts_as_json() -> None:
    rows = run_json("layouts")["layouts"]
    assert [row["name"] for row in rows] == list(PRESETS)
    fields = ["name", "layout", "engine", "releases", "extents", "memory", "note"]
    assert all(list(row) == fields for row in rows)
    split = next(row for row in rows if row["name"] == "vllm-dsa-split")
    assert split["extents"] == {"kv": 2, "dim": [128, 4]}


def test_one_layout() -> None:
    code, out, err = run("layouts", "vllm-dsv4-split")
    # which shares its string
    preset = PRESETS["vllm-dsv4-split"]
    same = "vllm-dsa-split"
    assert (code, err) == (0, "")
    for part in (preset.layout, preset.engine, preset.note, "kv=2, dim=(576, 8)", same):
        assert part in " ".join(out.split())
    assert out.endswith(f"\n{draw(preset.layout)}\n")


def test_a_string_gets_its_picture() -> None:
    text = "layer token kv (head dim)"
    preset = PRESETS["chunk-2ltd"]
    assert run("layouts", text)[1].endswith(f"\n{draw(text)}\n")
    report = run_json("layouts", text)
    assert (report["name"], report["layout"], report["same_layout"]) == (None, text, [])
    report = run_json("layouts", preset.name)
    assert (report["picture"], report["same_layout"]) == (draw(preset.layout), ["chunk-2ltd-mla"])
    assert (report["name"], report["engine"]) == (preset.name, preset.engine)


# portakv bench


@pytest.mark.parametrize(
    ("line", "function", "returned", "code", "expected"),
    [
        (
            "bench --json --help a",
            "portakv_benchmarks.cli.main",
            4,
            4,
            call(["--json", "--help", "a"]),
        ),
        ("bench", "portakv_benchmarks.cli.main", None, 0, call([])),
    ],
)
def test_words_are_handed_on(
    line: str,
    function: str,
    returned: int | None,
    code: int,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = Mock(return_value=returned)
    monkeypatch.setattr(function, ran)
    assert run(*line.split())[0] == code
    assert ran.call_args_list == [expected]


@pytest.mark.parametrize(
    ("missing", "messages"),
    [
        ("portakv_benchmarks.cli", ["needs a clone of PortaKV", "pip install -e '.[bench]'"]),
        ("matplotlib", ["needs 'matplotlib'", "pip install -e '.[bench]'"]),
    ],
)
def test_bench_without_a_package(
    missing: str, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", refuse)
    code, out, err = run("bench", "--json")
    assert (code, out) == (1, "")
    assert all(words in err for words in messages)
