# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: plans, defaults and candidates, and engines by defaults or by a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import FOUNDING, Absent, Late, Shy, registered, run, run_json
from support.simdev_cases import NAME

from portakv.interconnect.costs import Point, Table, as_json
from portakv.layout.language import parse
from portakv.layout.presets import PRESETS
from portakv.runtime.bounded import Bounded, caches


def test_explain() -> None:
    code, out, err = run("explain", *FOUNDING, "--device", "cpu")
    assert (code, err) == (0, "")
    for text in (
        *FOUNDING,
        "list of 32, each (2, 8, 16, 32, 128)",
        "(2, 32, 128, 4096)",
        "slot mapping: an id for each token",
        "unit 1 token, vector 16 B, 524288 B a token\n",
        "copy 8192 B in vectors of 16 B\n",
    ):
        assert text in out
    assert "On cpu, reference executes it: the first candidate" in out
    assert next(x for x in out.splitlines() if x.startswith("reference")).split()[1] == "chosen"


def test_explain_as_json() -> None:
    report = run_json("explain", *FOUNDING, "--device", "cpu")
    assert list(report) == [
        "source",
        "destination",
        "plan",
        "device",
        "forced",
        "backend",
        "why",
        "notes",
        "candidates",
    ]
    assert report["source"] == {
        "asked": FOUNDING[0],
        "layout": FOUNDING[0],
        "dtype": "float16",
        "tensors": "list of 32, each (2, 8, 16, 32, 128)",
        "layers": 32,
        "kv": 2,
        "heads": 32,
        "width_bytes": [256, 256],
        "block_size": 16,
        "opaque": False,
        "step": 1,
    }
    plan = report["plan"]
    assert (plan["unit"], plan["vector_bytes"], plan["token_bytes"]) == (1, 16, 2 * 32 * 32 * 256)
    (nest,) = plan["nests"]
    assert (nest["run_bytes"], nest["vector_bytes"]) == (32 * 256, 16)
    assert nest["destination"]["units"] == [{"extent": 0, "table": 0, "bytes": 8192}]
    layer, kv = nest["loops"]
    assert (layer["axis"], layer["extent"], layer["destination"]["bytes"]) == ("layer", 32, 1 << 20)
    assert (kv["axis"], kv["source"], kv["extent"]) == ("kv", {"table": 0, "bytes": 1 << 20}, 2)
    assert plan["text"].splitlines()[0] == "unit 1 token, vector 16 B, 524288 B a token"
    assert (report["device"], report["backend"], report["forced"]) == ("cpu", "reference", False)


def test_explain_lists_everything_that_remembers() -> None:
    cache: Bounded[str, int] = Bounded("things of a test", 7)
    cache["a"] = 1
    report = run_json("explain", "--caches")["caches"]
    assert {"name": "things of a test", "size": 1, "limit": 7, "caches": 1} in report
    assert sum(row["caches"] for row in report) == len(caches())
    row = next(line for line in run("explain", "--caches").out.splitlines() if "of a test" in line)
    assert row.split()[-1] == "7"


def test_caches_of_one_name_are_one_row() -> None:
    both = [Bounded[str, int]("twins of a test", 5) for _ in range(2)]
    both[0]["a"] = 1
    report = run_json("explain", "--caches")["caches"]
    assert {"name": "twins of a test", "size": 1, "limit": 5, "caches": 2} in report
    assert len({(row["name"], row["limit"]) for row in report}) == len(report)
    out = run("explain", "--caches").out
    assert out.count("twins of a test") == 1
    assert "5 in each of 2" in out
    assert "These are the limits alone" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["epd", "epd", "--index", "blocks"], (16, 16, 524288)),
        (["epd", "epd", "--index", "blocks", "--block-size", "32,16"], (16, 16, 524288)),
        (["epd", "epd", "--index", "blocks", "--block-size", "24,16"], (8, 16, 524288)),
        (["epd", "epd", "--src-step", "8", "--dst-step", "0"], (8, 16, 524288)),
        (["epd", "epd", "--layers", "3", "--heads", "5", "--dim", "7"], (1, 2, 3 * 2 * 5 * 14)),
        (["epd", "epd", "--dtype", "torch.uint8", "--dim", "66", "--heads", "1"], (1, 2, 64 * 66)),
        (["vllm-ascend", "vllm-0.26-hnd", "--dim", "128,64"], (1, 16, 32 * 32 * (256 + 128))),
        (["vllm-ascend-dsa", "vllm-ascend-dsa", "--dim", "512,64,128"], (1, 16, 32 * 704 * 2)),
        (["vllm-mla-fp8", "chunk-2ltd-mla"], (1, 16, 32 * 656)),  # bytes, as the preset says
        (["vllm-mla", "layer token dim"], (1, 16, 32 * 576 * 2)),
        (["epd", "token kv (head dim)"], (1, 16, 2 * 32 * 256)),  # a layer that one side lacks
        (["vllm-dsa", "vllm-dsa", "--layers", "3", "--dim", "96"], (16, 16, 3 * 96 * 2 // 16)),
    ],
)
def test_explain_fills_in_and_obeys(words: list[str], expected: tuple[int, int, int]) -> None:
    plan = run_json("explain", "--device", "cpu", *words)["plan"]
    assert (plan["unit"], plan["vector_bytes"], plan["token_bytes"]) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_explain_takes_every_preset(name: str) -> None:
    axes = parse(PRESETS[name].layout).axes
    words = ["--layers", "2"] if "layer" in axes else []
    if "head" in axes and "heads" not in PRESETS[name].extents:
        words += ["--heads", "4"]
    report = run_json("explain", name, name, "--device", "cpu", *words)
    side = report["source"]
    assert (side["asked"], side["layout"]) == (name, PRESETS[name].layout)
    row = side["layers"] * side["heads"] * sum(side["width_bytes"])
    tokens = side["block_size"] if side["opaque"] else 1
    assert report["plan"]["token_bytes"] == row // tokens


@pytest.mark.simdev
def test_explain_says_how_rows_of_another_device_cross() -> None:
    words = "explain", *FOUNDING, "--layers", "2", "--device", f"{NAME}:1"
    report = run_json(*words, "--src-device", f"{NAME}:0", "--overlap", "idle")
    assert report["backend"] == "bounce"
    assert report["why"].startswith("goes through pinned host memory, since torch does not report")
    assert report["device"] == f"{NAME}:1"
    code, _, err = run(*words, "--src-device", "cpu")
    assert code == 1
    assert "Expected a reader of the same device type" in err
    assert run_json(*words, "--src-device", f"{NAME}:1") == run_json(*words)
    with pytest.raises(SystemExit) as wrong:
        run("explain", "--host", "--src-device", f"{NAME}:0")
    assert wrong.value.code == 2


def answers_in(report: Any) -> dict[str, tuple[bool, bool, str]]:
    return {c["name"]: (c["accepted"], c["chosen"], c["reason"]) for c in report["candidates"]}


def test_explain_tells_who_refused_the_plan() -> None:
    words = (*FOUNDING, "--dim", "2", "--heads", "1", "--device", "cpu")
    with registered(shy=Shy, absent=Absent, late=Late):
        report = run_json("explain", *words)
        text = " ".join(run("explain", *words).out.split())
    assert report["backend"] == "reference"
    assert report["why"].endswith("the candidates before it rejected it")
    answers = answers_in(report)
    narrow = "it needs 16 B alignment and the plan allows 4 B"
    assert answers["shy"] == (False, False, narrow)
    assert answers["absent"] == (False, False, "its driver [v2] is not installed")
    assert "prepare dislikes it" in answers["late"][2]
    assert (answers["late"][0], answers["reference"][:2]) == (False, (True, True))
    assert narrow in text


def test_explain_tells_who_was_not_needed() -> None:
    with registered(shy=Shy, absent=Absent):
        report = run_json("explain", *FOUNDING, "--device", "cpu")
    assert report["backend"] == "shy"
    answers = answers_in(report)
    assert answers["absent"] == (False, False, "its driver [v2] is not installed")
    assert answers["reference"][:2] == (True, False)
    assert answers["reference"][2].endswith("accepts the plan too, but shy comes before it")


@pytest.mark.parametrize("how", ["PORTAKV_BACKEND", "--backend"])
def test_explain_tells_what_was_forced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(shy=Shy):
        words = ["--backend", "reference"]
        if how == "PORTAKV_BACKEND":
            monkeypatch.setenv(how, "reference")
            words = ["--backend", "shy"]  # which the environment beats
        report = run_json("explain", *FOUNDING, "--device", "cpu", *words)
        answer = [report[name] for name in ("backend", "forced", "why")]
        assert answer == ["reference", True, f"forced by {how}"]
        accepted, chosen, reason = answers_in(report)["shy"]
        assert (accepted, chosen) == (True, False)
        assert reason.endswith("accepts the plan too, but reference was forced")


# portakv explain --host, on a machine without a device

COMMAND = ("explain", "--host", "--blocks", "1000", "--run-bytes", "32768", "--direction", "d2h")


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of tables that holds nothing, on a machine without an accelerator."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path / "cache"))


host = pytest.mark.usefixtures("no_table")


@host
def test_the_command_of_the_guide() -> None:
    code, out, err = run(*COMMAND)
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for text in (
        "31.25 MiB from the device to pinned host memory. Runs: 1000 on the device, 1000 on the",
        "There is no accelerator here; the answers assume that every strategy serves one.",
        "batched_memcpy executes it: the default rule for runs of 32 KiB or more that gathering "
        "would not merge, as nothing was measured here.",
        "Terms: overlap='compute': assume that the device runs a model meanwhile.",
        "Times: not measured, so that the default rule picks strategies: there is no accelerator "
        "to measure.",
    ):
        assert text in flat
    rows = [line.split()[:2] for line in out.splitlines()]
    for row in (
        "staged accepted",
        "batched_memcpy chosen",
        "zero_copy rejected",
        "pageable rejected",
    ):
        assert rows.count(row.split()) == 1


@host
def test_host_as_json() -> None:
    report = run_json(*COMMAND)
    assert list(report) == [
        "direction",
        "bytes",
        "runs",
        "host_runs",
        "host_memory",
        "engine",
        "why",
        "terms",
        "measured",
        "origin",
        "note",
        "engines",
    ]
    assert [*report.values()][:5] == ["d2h", 32_768_000, 1000, 1000, "pinned"]
    assert (report["terms"]["overlap"], report["measured"]) == ("compute", False)
    engines = {one["engine"]: one for one in report["engines"]}
    assert list(engines) == ["staged", "batched_memcpy", "zero_copy", "pageable"]
    assert engines["zero_copy"]["refused"].startswith("with overlap='compute'")
    assert engines["pageable"]["refused"] == "it does not copy pinned memory"
    assert engines["staged"] == {
        "engine": "staged",
        "run_bytes": 32768,
        "runs": 1000,
        "seconds": None,
        "measured": False,
        "refused": "",
        "host_seconds": None,
        "answer": "accepted",
        "gbps": None,
    }


@host
@pytest.mark.parametrize(
    ("words", "engine"),
    [
        (["--host-runs", "1"], "staged"),
        (["--host-runs", "1", "--direction", "h2d"], "staged"),
        (["--overlap", "idle", "--run-bytes", "4K"], "zero_copy"),
        (["--max-thread-blocks", "2", "--run-bytes", "4K"], "zero_copy"),
        (["--max-gbps", "30"], "zero_copy"),
        (["--blocks", "4000", "--host-runs", "60"], "staged"),
        (["--run-bytes", "1K"], "zero_copy"),
        (["--run-bytes", "4K"], "zero_copy"),
        (["--pageable"], "pageable"),
        (["--blocks", "10"], "zero_copy"),
        (["--run-bytes", "4M", "--blocks", "64"], "batched_memcpy"),
    ],
)
def test_what_is_asked_decides(words: list[str], engine: str) -> None:
    assert run_json(*COMMAND, *words)["engine"] == engine


@host
def test_what_is_not_said_is_a_run_of_32_kib() -> None:
    for words, runs, nbytes in (
        ("", 1, 32768),
        ("--payload 100M --run-bytes 1M", 100, 100 << 20),
        ("--payload 100", 1, 100),
    ):
        report = run_json("explain", "--host", *words.split())
        assert (report["runs"], report["bytes"], report["direction"]) == (runs, nbytes, "d2h")


@host
def test_terms_are_told() -> None:
    _, out, _ = run(*COMMAND, "--max-gbps", "12.5", "--overlap", "idle", "--max-thread-blocks", "3")
    terms = "overlap='idle': assume that the device does nothing else; max_gbps=12.5; max_thread_"
    assert f"{terms}blocks=3" in " ".join(out.split())


@host
@pytest.mark.parametrize(("seconds", "engine"), [(0.25, "staged"), (3.0, "batched_memcpy")])
def test_a_table_of_another_machine(seconds: float, engine: str, tmp_path: Path) -> None:
    columns = {
        "staged": {32768: [Point(1000, seconds, 0)]},
        "batched_memcpy": {32768: [Point(1000, 1.0, 0)]},
    }
    points = {(name, "d2h"): own for name, own in columns.items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(as_json(Table({"model": "Another Card"}, points))))
    report = run_json(*COMMAND, "--table", str(path))
    assert report["engine"] == engine
    assert report["origin"] == f"measured on Another Card ({path})"
    engines = {one["engine"]: one for one in report["engines"]}
    assert (engines["staged"]["seconds"], engines["staged"]["measured"]) == (seconds, True)
    assert engines["zero_copy"]["measured"] is False


def test_explain_an_encoding() -> None:
    words = ["explain", "vllm-nhd", "block layer kv head page", "--encoding", "pack"]
    code, out, err = run(*words, "--device", "cpu", "--layers", "2", "--heads", "4")
    assert (code, err) == (0, "")
    assert "2048 values  4096 B  3136 B  1.306" in out
    assert "A block has 65536 B raw and 50176 B packed." in out
    assert "PackOverflow" in out
    assert "portakv_pack with thread blocks of 128, portakv_unpack with" in out
    assert [x.split()[:3] for x in out.splitlines() if x.split()[:1] == ["unpacks"]] == [
        ["unpacks", "reference", "chosen"]
    ]


def test_explain_unpacking_from_an_image() -> None:
    words = ["vllm-nhd", "block layer kv head page"]
    terms = ["--encoding", "pack", "--device", "cpu", "--layers", "2"]
    packs = run_json("explain", *words, *terms)
    unpacks = run_json("explain", *reversed(words), *terms)
    assert unpacks["ways"] == [*reversed(packs["ways"])]
    assert run("explain", *reversed(words), *terms)[1].index("unpack (pack)") > 0
    assert unpacks["source"] == words[1]
    code, out, err = run("explain", words[1], words[1], *terms)
    assert (code, out) == (1, "")
    assert "which both have pages" in err


def test_explain_an_encoding_as_json() -> None:
    words = ["explain", "vllm-mla", "layer | block page", "--encoding", "pack/1:3"]
    report = run_json(*words, "--device", "cpu", "--layers", "2")
    assert report["planes"][0]["slot_bytes"] == 13216
    assert report["block_bytes"] == {"raw": 36864, "packed": 26432}
    assert [way["does"] for way in report["ways"]] == ["packs", "unpacks"]
    assert {answer["backend"] for way in report["ways"] for answer in way["answers"]} == {
        "reference"
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--encoding", "zip"], "Expected --encoding to be 'pack', or a text such as 'pack/1:4'"),
        (["--encoding", "pack/1:7"], "Expected code_bits to be 3 or 4, got 7"),
        (["--encoding", "fp8"], "no plan of 'fp8', which operations of torch convert"),
        (["--encoding", "pack", "--dtype", "float16"], "of float16"),
        (["--encoding", "pack", "--dim", "3"], "planes of 48 values"),
    ],
)
def test_an_encoding_that_cannot_be_explained(words: list[str], expected: str) -> None:
    code, _, err = run("explain", "vllm-nhd", "block layer kv head page", "--device", "cpu", *words)
    assert code == 1
    assert expected in err
