# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: plans, defaults, candidates and errors."""

from __future__ import annotations

import pytest
from support.command_line import (
    FOUNDING,
    Absent,
    Late,
    Shy,
    registered,
    run,
    run_json,
)

from portakv.layout.language import parse
from portakv.layout.presets import PRESETS
from portakv.runtime.bounded import Bounded, caches


@pytest.mark.usefixtures("either")
def test_explain() -> None:
    code, out, err = run("explain", *FOUNDING, "--device", "cpu")
    assert (code, err) == (0, "")
    for text in (
        FOUNDING[0],
        FOUNDING[1],
        "list of 32, each (2, 8, 16, 32, 128)",
        "(2, 32, 128, 4096)",
        "slot mapping: an id for each token",
        "unit 1 token, vector 16 B, 524288 B a token\n",
        "copy 8192 B in vectors of 16 B\n",
    ):
        assert text in out
    assert "On cpu, reference carries it out: the first candidate" in out
    assert next(x for x in out.splitlines() if x.startswith("reference")).split()[1] == "chosen"


def test_explain_as_json() -> None:
    found = run_json("explain", *FOUNDING, "--device", "cpu")
    assert list(found) == [
        "source", "destination", "plan", "device", "forced", "backend", "why", "notes",
        "candidates",
    ]  # fmt: skip
    assert found["source"] == {
        "asked": FOUNDING[0],
        "layout": FOUNDING[0],
        "tensors": "list of 32, each (2, 8, 16, 32, 128)",
        "dtype": "float16",
        "layers": 32,
        "kv": 2,
        "heads": 32,
        "width_bytes": [256, 256],
        "block_size": 16,
        "opaque": False,
        "step": 1,
    }
    plan = found["plan"]
    assert (plan["unit"], plan["vector_bytes"], plan["token_bytes"]) == (1, 16, 2 * 32 * 32 * 256)
    (nest,) = plan["nests"]
    assert (nest["run_bytes"], nest["vector_bytes"]) == (32 * 256, 16)
    assert nest["destination"]["units"] == [{"extent": 0, "table": 0, "bytes": 8192}]
    layer, kv = nest["loops"]
    assert (layer["axis"], layer["extent"], layer["destination"]["bytes"]) == ("layer", 32, 1 << 20)
    assert (kv["axis"], kv["source"], kv["extent"]) == ("kv", {"table": 0, "bytes": 1 << 20}, 2)
    assert plan["text"].splitlines()[0] == "unit 1 token, vector 16 B, 524288 B a token"
    assert (found["device"], found["backend"], found["forced"]) == ("cpu", "reference", False)


@pytest.mark.usefixtures("either")
def test_explain_lists_everything_that_remembers() -> None:
    kept: Bounded[str, int] = Bounded("things of a test", 7)
    kept["a"] = 1
    found = run_json("explain", "--caches")["caches"]
    assert {"name": "things of a test", "size": 1, "limit": 7} in found
    assert len(found) == len(caches())
    row = next(line for line in run("explain", "--caches").out.splitlines() if "of a test" in line)
    assert row.split()[-2:] == ["1", "7"]


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
    found = run_json("explain", name, name, "--device", "cpu", *words)
    side = found["source"]
    assert (side["asked"], side["layout"]) == (name, PRESETS[name].layout)
    row = side["layers"] * side["heads"] * sum(side["width_bytes"])
    tokens = side["block_size"] if side["opaque"] else 1
    assert found["plan"]["token_bytes"] == row // tokens


@pytest.mark.usefixtures("either")
def test_explain_tells_who_refused_the_plan() -> None:
    with registered(shy=Shy, absent=Absent):
        words = (*FOUNDING, "--dim", "2", "--heads", "1", "--device", "cpu")
        found = run_json("explain", *words)
        assert found["backend"] == "reference"
        assert found["why"].endswith("those before it refused it")
        answers = {
            c["name"]: (c["accepted"], c["chosen"], c["reason"]) for c in found["candidates"]
        }
        assert answers["shy"] == (False, False, "it needs 16 B alignment and the plan allows 4 B")
        assert answers["absent"] == (False, False, "its driver [v2] is not installed")
        assert answers["reference"][:2] == (True, True)
        _, out, _ = run("explain", *words)
        assert "it needs 16 B alignment and the plan allows 4 B" in " ".join(out.split())


def test_explain_tells_who_was_not_needed() -> None:
    with registered(shy=Shy, absent=Absent):
        found = run_json("explain", *FOUNDING, "--device", "cpu")
        assert found["backend"] == "shy"
        absent = next(c for c in found["candidates"] if c["name"] == "absent")
        assert (absent["accepted"], absent["reason"]) == (False, "its driver [v2] is not installed")
        last = next(c for c in found["candidates"] if c["name"] == "reference")
        assert (last["accepted"], last["chosen"]) == (True, False)
        assert last["reason"].endswith("takes the plan too, but shy is asked before it")


def test_explain_tells_what_preparing_refused() -> None:
    with registered(late=Late):
        found = run_json("explain", *FOUNDING, "--device", "cpu")
        assert found["backend"] == "reference"
        late = next(c for c in found["candidates"] if c["name"] == "late")
        assert (late["accepted"], late["chosen"]) == (False, False)
        assert "its module does not load" in late["reason"]


@pytest.mark.parametrize("how", ["PORTAKV_BACKEND", "--backend"])
def test_explain_tells_what_was_forced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(shy=Shy):
        words = ["--backend", "reference"]
        if how == "PORTAKV_BACKEND":
            monkeypatch.setenv(how, "reference")
            words = ["--backend", "shy"]  # which the environment beats
        found = run_json("explain", *FOUNDING, "--device", "cpu", *words)
        assert (found["backend"], found["forced"], found["why"]) == (
            "reference", True, f"forced by {how}",
        )  # fmt: skip
        shy = next(c for c in found["candidates"] if c["name"] == "shy")
        assert (shy["accepted"], shy["chosen"]) == (True, False)
        assert shy["reason"].endswith("takes the plan too, but reference was forced")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["layer | blok token dim", "epd"], "Unknown axis 'blok'"),
        (["vllm-nh", "epd"], "Near names: vllm-nhd"),
        (["vllm-dsa", "vllm-nhd"], "opaque pages and rows"),
        (["vllm-dsa", "vllm-dsa", "--src-step", "1"], "a page moves only whole"),
        (["epd", "epd", "--dim", "1,2,3"], "unequal widths"),
        (["epd", "token kv (head dim)", "--layers", "3"], "does not name 'layer'"),
        (["vllm-mla-fp8", "epd", "--dim", "128"], "true only for dim=656"),
        (["vllm-ascend-nz", "epd", "--dim", "33"], "cannot divide"),
        (["epd", "epd", "--device", "nonsense"], "torch cannot use it here"),
        (["epd", "epd", "--device", "meta"], "no memory"),
        (["epd", "epd", "--backend", "nonsense"], "no such backend"),
        (["epd", "epd", "--blocks", "10000000000000"], "could not be made"),
        (["epd", "epd", "--blocks", "1" + "0" * 20], "could not be made"),
    ],
)
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_explain_ends_with_a_sentence(words: list[str], why: str, option: tuple[str, ...]) -> None:
    code, out, err = run("explain", *words, *option)
    assert (code, out) == (1, "")
    assert err.startswith("portakv: ")
    assert why in err


def test_an_unknown_forced_name_says_where_the_trace_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "nonsense")
    code, out, err = run("explain", *FOUNDING)
    assert (code, out) == (1, "")
    assert "'nonsense' was forced" in err
    assert "portakv backends --device cpu" in err
