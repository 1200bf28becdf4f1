# SPDX-License-Identifier: Apache-2.0
"""What a report says of the backend's source and of where it ran."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from portakv.backends.base import Capabilities
from portakv.backends.reference import Reference
from portakv_conformance.evidence.environment import (
    describe_backend,
    describe_environment,
    is_emulated,
    plain,
)
from portakv_conformance.evidence.source import SourceError, source_files, source_sha256
from portakv_conformance.judge.subject import Subject, subject


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a third party's package, which can be imported."""
    folder = tmp_path / "acme_rows"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "backend.py", "inner/__init__.py", "inner/kernel.cu"):
        (folder / name).write_text(f"# {name}\n")
    (tmp_path / "acme_alone.py").write_text("# alone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def judged() -> Subject:
    return subject("reference", "cpu")


def test_each_file_of_a_third_party_counts(vendor: Path) -> None:
    files = source_files("acme_rows.backend")
    assert set(files) == {"__init__.py", "backend.py", "inner/__init__.py", "inner/kernel.cu"}
    before = source_sha256("acme_rows.backend:Acme")
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert source_sha256("acme_rows.backend:Acme") == before
    for name in files:
        (vendor / name).write_text("# changed\n")
        after = source_sha256("acme_rows.backend:Acme")
        assert after != before
        before = after


def test_what_is_compiled_from_it_does_not_count(vendor: Path) -> None:
    before = source_sha256("acme_rows:Acme")
    (vendor / "__pycache__").mkdir()
    (vendor / "__pycache__" / "backend.py").write_text("")
    (vendor / "notes.txt").write_text("")
    assert source_sha256("acme_rows:Acme") == before


def test_a_module_by_itself_is_its_file(vendor: Path) -> None:
    assert list(source_files("acme_alone")) == ["acme_alone.py"]


def test_a_module_without_source_is_told() -> None:
    for name in ("no_such_module.at.all", "sys", "no such"):
        with pytest.raises(SourceError, match="module"):
            source_sha256(f"{name}:Class")


def test_our_own_backends_count_what_they_build_on() -> None:
    cuda = set(source_files("portakv.backends.cuda"))
    assert {"portakv.backends.cuda.py", "portakv.runtime.nvrtc.py"} <= cuda
    assert "portakv_native.cuda/rows.cuh" in cuda
    compiled = set(source_files("portakv.backends.compiled"))
    assert "portakv.backends.strided.py" in compiled
    hip = set(source_files("portakv.backends.hip"))
    assert {"portakv.runtime.hip.py", "portakv_native.cuda/rows.cuh"} <= hip
    ascend = set(source_files("portakv.backends.ascend"))
    assert "portakv_native.ascend/rows.h" in ascend
    reference = set(source_files("portakv.backends.reference"))
    assert {"portakv.backends.reference.py", "portakv.backends.strided.py"} <= reference
    assert not any(name.startswith("portakv_native") for name in reference | compiled)
    assert not any(name.endswith(".base.py") for name in cuda | compiled | reference)


def test_what_was_judged(judged: Subject) -> None:
    told = describe_backend(judged)
    assert told["target"] == "portakv.backends.reference:Reference"
    assert told["source_sha256"] == source_sha256(told["target"])
    assert told["version"]


def test_a_class_without_source_is_still_described(judged: Subject) -> None:
    told = describe_backend(replace(judged, target="no_such_module:Class"))
    assert told["source_sha256"].startswith("unknown: module 'no_such_module'")


def test_where_it_was_judged(judged: Subject) -> None:
    facts = describe_environment(judged, "cpu")
    assert {"torch", "python", "os", "device", "device_name", "driver", "emulated"} <= set(facts)
    assert facts["torch"] == str(torch.__version__)
    assert {"numpy", "pytest", "hypothesis"} <= set(facts)
    assert facts["emulated"] is False
    assert all(isinstance(value, str | int) for value in facts.values())


def test_who_emulates(judged: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device, an interpreter of kernels, or a backend that says so."""
    assert is_emulated(replace(judged, emulated=True))
    triton = replace(judged, target="portakv.backends.triton:Triton")
    assert not is_emulated(triton)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_emulated(triton)
    assert not is_emulated(judged)

    class Model(Reference):
        emulated = True

    assert is_emulated(replace(judged, backend=Model(torch.device("cpu"))))


def test_claims_in_plain_values() -> None:
    claims = Capabilities(places=frozenset({("device", "device"), ("device", "pinned")}))
    assert plain(claims) == {
        "places": [["device", "device"], ["device", "pinned"]],
        "index_on": "device",
        "index_dtypes": ["int32", "int64"],
        "skips_negative": False,
        "guards": False,
        "alignment": 1,
        "max_loops": None,
        "tables": True,
        "capturable": False,
        "threads": True,
    }


def test_nonsense_in_plain_values() -> None:
    assert plain({1: object, "a": {3, "b"}, "c": (torch.float16, 1.5)}) == {
        "1": "<class 'object'>", "a": [3, "b"], "c": ["float16", 1.5],
    }  # fmt: skip
