# SPDX-License-Identifier: Apache-2.0
"""Every integration with an engine that is missing, too old or too new."""

from __future__ import annotations

import json
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run_json
from support.engine_process import answer
from support.guarded_memory import check_sentence

from portakv.integrations import (
    INTEGRATIONS,
    MATRIX,
    TIER_RELEASES,
    check_release,
    why_not,
)
from portakv.integrations.interfaces import differences

#: What an engine does to reach its integration.
REACHED = {
    "lmcache": "from portakv.integrations.lmcache import CpuSpec\nCpuSpec().is_available()",
    "sglang": "from portakv.integrations.sglang import register\nregister()",
    "transformers": "import portakv.integrations.transformers.caches",
    "vllm": "import portakv.integrations.vllm.offloading",
}
RELEASES = (None, "0.1", "99.0")
CODE = f"""
import json, sys
from importlib import metadata
from importlib.util import find_spec

if find_spec("sglang"):
    from support import sglang_on_cpu  # before SGLang

real, texts = metadata.version, {{}}
for release in {RELEASES!r}:
    for integration, code in {REACHED!r}.items():
        def version(name):
            if name == integration and release is None:
                raise metadata.PackageNotFoundError(name)
            return release if name == integration else real(name)
        metadata.version = version
        try:
            exec(code)
            reply = "nothing"
        except Exception as error:
            reply = type(error).__name__, str(error)
        texts[f"{{integration}} {{release}}"] = reply
    if release == "0.1":  # a later one is imported to see its interfaces
        here = [name for name in ("sglang", "transformers", "vllm") if name in sys.modules]
print(json.dumps([texts, here]))
"""


@pytest.fixture(scope="module")
def texts() -> Any:
    return json.loads(answer(CODE, LMCACHE_DEVICE_BACKEND="portakv-cpu", PORTAKV_SGLANG="1"))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("integration", MATRIX)
@pytest.mark.xdist_group("texts of releases")
def test_a_release_that_is_not_served(integration: str, release: str | None, texts: Any) -> None:
    # A release above the range is served if the one that is installed has the expected interfaces.
    if release == "99.0" and not differences(integration):
        assert texts[0][f"{integration} {release}"] == "nothing"
        return
    kind, sentence = texts[0][f"{integration} {release}"]
    assert kind == "IntegrationError", sentence
    has = "is not installed" if release is None else f"{integration} {release}"
    check_sentence(sentence, has, str(MATRIX[integration]), "PortaKV 0.", "Install")


@pytest.mark.parametrize(
    ("release", "served"),
    [
        ("0.5.3", False),
        ("0.5.3.post1", False),
        ("0.5.4.dev2+g1a2b3c4", True),
        ("0.5.4rc1", True),
        ("0.5.4", True),
        ("0.5.5", True),
        ("0.5.6.post1", True),
        ("0.5.99", True),
        ("0.5.100", True),
        ("0.6.0.dev1", None),
        ("0.6rc1", None),
        ("0.6", None),
        ("0.10.1", None),
        ("1.0", None),
        ("dev", False),
        ("", False),
    ],
)
def test_releases_between_those_that_were_run(
    release: str, served: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases above the range (None) are served if their interfaces are as expected."""
    if served is None:
        served = not differences("lmcache")
    monkeypatch.setattr(metadata, "version", lambda name: release)
    reply = why_not("lmcache")
    assert (reply is None) is served, reply
    if reply is not None:
        check_sentence(reply, f"lmcache {release} ")


@pytest.mark.parametrize(
    ("release", "run"),
    [("0.5.4", True), ("0.5.6+cpu", True), ("0.5.7", False), ("0.5.6rc1", False)],
)
def test_a_release_that_was_not_run_is_warned_of_once(
    release: str, run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: release)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python begins
        for _ in range(2):
            check_release("lmcache")
    assert len(caught) == (not run)
    for each in caught:
        check_sentence(str(each.message), f"lmcache {release}", "0.5.4 and 0.5.6", "PortaKV 0.")


def test_the_matrix_names_the_releases_that_are_run() -> None:
    script = (Path(__file__).parents[2] / ".ci/plugs").read_text()
    listed = re.search(r"^all=\((.*)\)$", script, re.MULTILINE)
    assert listed is not None
    named = [
        f"{integration}-{each}"
        for integration, release in MATRIX.items()
        for each in release.tested
    ]
    # This release is run as the build of vLLM for a CPU.
    named[named.index("vllm-0.32.0")] = "vllmcpu-0.32.0"
    # Dynamo's router reads events, and has no integration. A release may have two runs.
    runs = listed[1].split()
    run = [name for name in runs if not (name.startswith("dynamo-") or name.endswith("-rest"))]
    assert sorted(run) == sorted(named)


PAGES = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
#: The engine, the oldest release, the first one above the range, and the tested releases, where a
#: page names a range in a sentence.
RANGE = re.compile(
    r"(LMCache|SGLang|vLLM|transformers`?) \(?([0-9.]+) or newer, below ([0-9.]*[0-9])"
    r"(?:; tested with ([^)]*)\))?"
)
PAGES_OF = {
    "lmcache": {"lmcache.md"},
    "sglang": {"sglang.md"},
    "transformers": {"transformers.md"},
    "vllm": {"vllm.md"},
}


def test_pages_name_the_ranges_of_the_matrix() -> None:
    """`.ci/readme_tables.py` writes the tables; these are the sentences."""
    named: dict[str, set[str]] = {name: set() for name in MATRIX}
    for page in PAGES:
        text = " ".join(page.read_text("utf-8").split())
        for engine, least, below, tested in RANGE.findall(text):
            name = engine.strip("`").lower()
            known = MATRIX[name] if least != TIER_RELEASES.least else TIER_RELEASES
            assert (least, below) == (known.least, known.below), page.name
            if tested:
                assert tuple(re.findall(r"[0-9.]*[0-9]", tested)) == known.tested, page.name
            named[name].add(page.name)
        ranges = set(re.findall(r"([0-9.]+) (?:and|or) newer, below ([0-9.]*[0-9])", text))
        known_ranges = {(x.least, x.below) for x in (*MATRIX.values(), TIER_RELEASES)}
        assert ranges <= known_ranges, page.name
    assert named == PAGES_OF


def test_the_readme_and_the_doctor_suggest_one_configuration_of_vllm() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    shown = re.search(r"vllm serve MODEL --kv-transfer-config '(.*?)'\n", readme, re.DOTALL)
    assert shown is not None
    suggested = INTEGRATIONS["vllm"].line.removeprefix("--kv-transfer-config ").strip("'")
    assert json.loads(suggested) == json.loads(shown[1])


@pytest.mark.xdist_group("texts of releases")
def test_no_engine_is_imported_before_its_release_is_known(texts: Any) -> None:
    assert texts[1] == []


def test_doctor_agrees_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An integration would work exactly if its engine is installed here."""
    for integration in INTEGRATIONS.values():
        if integration.variable:
            monkeypatch.delenv(integration.variable, raising=False)
    for one in run_json("doctor")["plugs"]:
        expected = "rejected" if why_not(one["plug"]) else "on request"
        assert (one["plug"], one["answer"]) == (one["plug"], expected), one["reasons"]
