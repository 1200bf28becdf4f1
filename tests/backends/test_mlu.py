# SPDX-License-Identifier: Apache-2.0
"""The mlu backend: what it says of installed packages, and all else on the simulated device."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.command_line import python, run

from portakv.backends.base import Decision
from portakv.backends.mlu import Mlu
from portakv_conformance.judge.subject import _carried
from portakv_conformance.simdev import build

why_not = build.missing()
simulated = pytest.mark.skipif(why_not is not None, reason=why_not or "")

FIVE = "k, v, k_cache, v_cache, slot_mapping"
TRANSFER = (
    "key_value, kv_cache_ptrs, slot_mapping, paged_memory_device, page_buffer_size, direction, "
    "kv_format, block_size, head_size, skip_prefix_n_tokens"
)


def said(package: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Decision:
    """What `probe` says where torch_mlu_ops is a file of this text."""
    for name in ("torch_mlu_ops", "torch_mlu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if package is not None:
        (folder / "torch_mlu_ops.py").write_text(package)
    monkeypatch.syspath_prepend(str(folder))
    # torch knows devices named mlu only once torch_mlu was imported; `probe` reads the type alone.
    decision = Mlu.probe(SimpleNamespace(type="mlu"))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "torch_mlu_ops", raising=False)
    return decision


def test_other_devices_are_refused_before_anything_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_mlu_ops.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind in ("cpu", "cuda"):
        decision = Mlu.probe(torch.device(kind))
        assert str(decision) == f"mlu: rejected, it runs on mlu devices, not on {kind}"


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, r"^torch_mlu_ops is not installed; install torch_mlu and torch_mlu_ops of Cambricon "
         "Neuware$"),
        ("import torch_mlu", "torch_mlu, which torch_mlu_ops needs, is not installed; install"),
        ("raise ImportError('libcnnl.so: cannot open shared object file')",
         r"is installed, but its import failed \(ImportError: libcnnl.so: cannot open"),
        ("raise OSError('libcnrt.so: undefined symbol')", r"failed \(OSError: libcnrt.so: undef"),
        ("raise RuntimeError('CNRT error.')", r"failed \(RuntimeError: CNRT error\); install"),
        ("raise AttributeError('x')", r"\(AttributeError: x\); install torch_mlu and torch_mlu"),
        ("def reshape(", "SyntaxError"),
        ("__version__ = '0.1'", "torch_mlu_ops 0.1, which has no such op"),
        ("reshape_paged_cache = 7", "of unknown version, which has no such op"),
        ("def reshape_paged_cache(key, value, cache): ...",
         r"which has reshape_paged_cache\(key, value, cache\)"),
        (f"def reshape_paged_cache({FIVE}, direction, stream): ...", r"direction, stream\)"),
        ("def reshape_paged_cache(*args, **kwargs): ...",
         r"which has reshape_paged_cache\(args, kwargs\)"),
        ("reshape_paged_cache = type", r"which has reshape_paged_cache\(\.\.\.\)"),
    ],
)  # fmt: skip
def test_why_it_is_rejected(
    package: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = said(package, tmp_path, monkeypatch)
    assert not decision.accepted
    assert re.search(reason, decision.reason), decision.reason
    known = f"expected reshape_paged_cache({FIVE}, direction), or"
    installs = "install torch_mlu and torch_mlu_ops of Cambricon Neuware"
    assert (known if ", which has " in decision.reason else installs) in decision.reason


@pytest.mark.parametrize(
    ("package", "told"),
    [
        (f"def reshape_paged_cache({FIVE}): ...",
         "(to the cache only, since it has no direction) and no multi_layer_kv_transfer"),
        (f"def reshape_paged_cache({FIVE}, direction=False): ...",
         "(to and from the cache) and no multi_layer_kv_transfer"),
        (f"def reshape_paged_cache({FIVE}, direction=False): ...\n"
         f"def multi_layer_kv_transfer({TRANSFER}): ...",
         "(to and from the cache) and multi_layer_kv_transfer"),
        (f"def reshape_paged_cache({FIVE}, direction=False): ...\n"
         "def multi_layer_kv_transfer(key_value, slots): ...",
         "and a multi_layer_kv_transfer(key_value, slots) that is not the known one and is not "
         "used"),
    ],
)  # fmt: skip
def test_what_a_release_has_is_told(
    package: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = said(f"__version__ = '1.4.0'\n{package}", tmp_path, monkeypatch)
    assert decision.accepted
    assert decision.reason.startswith("torch_mlu_ops 1.4.0 has reshape_paged_cache ")
    assert decision.reason.endswith(told)


# -- on the simulated device ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "seen"),
    [("simdev:mlu", "mlu"), ("simdev:npu:1", "npu:1"), ("simdev", "simdev"),
     ("simdev:1", "simdev:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)  # fmt: skip
def test_the_name_behind_simdev_is_what_torch_gets_to_see(asked: str, seen: str) -> None:
    assert _carried(asked) == seen


@simulated
def test_a_device_without_the_package_falls_to_reference_with_the_reason() -> None:
    code = (
        "from portakv_conformance import simdev; simdev.load('mlu')\n"
        "from portakv import AdaptiveConnector, BackendUnavailable\n"
        "layouts = {'kv_layout': 'mlu', 'chunk_layout': 'chunk-2ltd'}\n"
        "print(AdaptiveConnector('mlu', **layouts).explain())\n"
        "try:\n"
        "    AdaptiveConnector('mlu', backend='mlu', **layouts)\n"
        "except BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    chosen, _, forced = python("-c", code).partition(
        "Backend 'mlu' was forced, but it cannot serve"
    )
    assert chosen.startswith("mlu:0: backend 'reference' was chosen\n")
    assert "mlu: rejected, torch_mlu_ops is not installed; install torch_mlu and" in chosen
    assert forced.startswith(" mlu:0: torch_mlu_ops is not installed; install torch_mlu and")


@simulated
@pytest.mark.full
def test_a_judgement_on_it_says_that_it_is_emulated(tmp_path: Path) -> None:
    case = "cases/test_core.py::test_consecutive_rows_need_no_list[gather]"
    words = "mlu", "--device", "simdev:mlu", "--report", str(tmp_path), "--only", case
    assert run("conform", *words).code == 0
    record = json.loads((tmp_path / "conformance.json").read_text())
    assert record["environment"]["emulated"] is True
    assert record["environment"]["device"] == "simdev:mlu"
    assert record["environment"]["device_name"].startswith("simulated device (mlu")
    assert "torch_mlu_ops stand-in (emulated)" in record["trace"][0]
    assert "--device simdev:mlu" in record["command"]


@simulated
@pytest.mark.parametrize(
    ("device", "code", "told"),
    [
        ("simdev:npuu", 2, "was asked to be 'npuu'; it can be simdev, npu, mlu"),
        pytest.param("simdev:npu", 3, "it runs on mlu devices, not on npu", marks=pytest.mark.full),
    ],
)
def test_names_that_the_simulated_device_does_not_carry(device: str, code: int, told: str) -> None:
    ran = run("conform", "mlu", "--device", device)
    assert (ran.code, told in ran.err) == (code, True), ran


@simulated
@pytest.mark.slow
def test_it_is_conformant_there(tmp_path: Path) -> None:
    words = "mlu", "--device", "simdev:mlu", "--profile", "full", "--report", str(tmp_path)
    ran = run("conform", *words)
    assert ran.code == 0, ran
    assert "emulated): conformant, R3." in ran.out
