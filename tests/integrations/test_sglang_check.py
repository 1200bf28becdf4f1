# SPDX-License-Identifier: Apache-2.0
"""The check of SGLang's extra configuration of a storage backend, with a stand-in or without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run, run_json
from support.sglang_stub import write_sglang

from portakv.integrations.sglang.check import CLASS, MODULE, hicache_findings_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines" / "sglang.md"


def right(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "backend_name": "portakv",
        "module_path": MODULE,
        "class_name": CLASS,
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "portakv": {"folder": str(folder / "kv"), "host": 0, "capacity": 1 << 20},
        **more,
    }


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sglang(tmp_path / "engine")
    monkeypatch.syspath_prepend(str(tmp_path / "engine"))


def test_a_right_configuration(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(0o700)
    findings = hicache_findings_of(right(tmp_path))
    assert (findings.errors, findings.warnings) == ([], [])
    assert len(findings.notes) == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another module": ({"module_path": "portakv"}, "module_path"),
    "another class": ({"class_name": "HiCacheFile"}, "class_name"),
    "no name": ({"backend_name": ""}, "backend_name"),
    "a key with a slip": ({"interface_vl": 1}, "Did you mean interface_v1?"),
    "divided pages": ({"tp_lcm_size": 4}, "tp_lcm_size"),
    "no terms": ({"portakv": None}, "'portakv'"),
    "a wrong term": ({"portakv": {"floder": "/x"}}, "'floder'"),
    "a wrong option of a bucket": (
        {"portakv": {"bucket": "s3://b/kv", "bucket_options": {"no_such_option": "1"}, "host": 0}},
        "portakv: ",
    ),
    "an engine's term": ({"portakv": {"folder": "/x", "by_layer": True}}, "by_layer"),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    (error,) = hicache_findings_of(right(tmp_path, **more)).errors
    assert message in error


@pytest.mark.parametrize("key", ["interface_v1", "hicache_storage_pass_prefix_keys"])
def test_what_a_user_may_not_want(key: str, tmp_path: Path) -> None:
    findings = hicache_findings_of(right(tmp_path, **{key: 0}))
    assert findings.errors == []
    assert key in findings.warnings[0]


def test_a_release_without_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sglang(tmp_path / "older", "batch_set_v1")
    monkeypatch.syspath_prepend(str(tmp_path / "older"))
    (error,) = hicache_findings_of(right(tmp_path)).errors
    assert "HiCacheStorage.batch_set_v1" in error


def test_the_command(tmp_path: Path) -> None:
    good = run("doctor", "--hicache-config", json.dumps(right(tmp_path)))
    assert good.code == 0
    assert "SGLang starts with this configuration" in good.out
    bad = run("doctor", "--hicache-config", "{}")
    assert bad.code == 1
    assert "would not start" in bad.out
    file = tmp_path / "extra.json"
    file.write_text(json.dumps(right(tmp_path)))
    assert run_json("doctor", "--hicache-config", f"@{file}")["errors"] == []


def test_the_line_of_the_page(tmp_path: Path) -> None:
    """The configuration that the page shows, with another folder."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"--hicache-storage-backend-extra-config '(\{.*?\})'\n", text, re.DOTALL)
    assert found
    config = json.loads(found[1])
    config["portakv"] = {**config["portakv"], "folder": str(tmp_path / "kv"), "capacity": 1 << 20}
    findings = hicache_findings_of(config)
    assert findings.errors == findings.warnings == []
