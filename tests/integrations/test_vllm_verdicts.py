# SPDX-License-Identifier: Apache-2.0
"""`portakv doctor` and the connector's start give one verdict of a configuration, without vLLM.

The cases of a real engine are in `test_vllm_cpu_schedules.py`.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from support.kv_transfer import BLOCK, WRONG_KEYS, WRONG_TERMS, right
from support.vllm_stub import configuration, write_vllm

from portakv.errors import PortaKVError
from portakv.integrations.vllm.caches import FUSED, never_fails, settings_of
from portakv.integrations.vllm.check import connector_findings_of
from portakv.integrations.vllm.ranks import WorkerStore, index_of, read_views

BLOCKS = 8
HEADS = 2
DIM = 16
#: A layer of bf16 as the engine's caches below have it.
MODEL = {
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": DIM,
    "torch_dtype": "bfloat16",
}
WINDOWS = {**MODEL, "sliding_window": 64}


class Base:
    """The connector's base class in a release with all hooks."""

    def bind_gpu_block_pool(self) -> None: ...

    def get_transfer_results(self) -> None: ...


def config_with(at: Path, **terms: Any) -> dict[str, Any]:
    """Return a configuration of a small store with some terms."""
    usual = {"folder": str(at), "capacity": 1 << 20, "host": 1 << 20, "staging": 1 << 20}
    return right(**usual | terms)


def model_folder(at: Path, config: dict[str, Any]) -> str:
    folder = at / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def checked(config: dict[str, Any], at: Path, model: dict[str, Any] = MODEL) -> list[str]:
    """Return the errors of the doctor, and hold its exit code to them."""
    options = ("--model", model_folder(at, model), "--block-size", str(BLOCK), "--json")
    ran = run("doctor", "--kv-transfer-config", json.dumps(config), *options)
    errors: list[str] = json.loads(ran.out)["errors"]
    assert ran.code == bool(errors)
    return errors


def start(config: dict[str, Any], model: dict[str, Any] = MODEL) -> None:
    """Do what the connector does with a configuration when an engine starts.

    Raises what ends the engine.
    """
    window = model.get("sliding_window")
    engine, caches = configuration("", "an engine of this test", BLOCKS, BLOCK, window)
    engine.kv_transfer_config.kv_role = config["kv_role"]
    engine.kv_transfer_config.kv_connector_extra_config = config["kv_connector_extra_config"]
    spec = caches.kv_cache_groups[0].kv_cache_spec
    spec.num_kv_heads = HEADS
    spec.head_size = DIM
    settings = settings_of(engine, caches)
    never_fails(Base, settings)
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM, dtype=torch.bfloat16)
    store = WorkerStore(settings, engine)
    views = read_views(settings, {"layer": cache}, caches, {"layer": FUSED[0]})
    try:
        store.open(views, 0)
        index_of(settings)
    finally:
        store.close()


@pytest.mark.parametrize("name", WRONG_TERMS)
def test_wrong_terms_have_one_verdict(name: str, tmp_path: Path) -> None:
    config = config_with(tmp_path / "kv", **WRONG_TERMS[name])
    with pytest.raises(PortaKVError) as refusal:
        start(config)
    errors = checked(config, tmp_path)
    said = str(refusal.value).removeprefix("kv_connector_extra_config: ")
    assert any(said.split(", got ")[0] in each for each in errors)


def test_right_terms_have_one_verdict(tmp_path: Path) -> None:
    """The control of the tests around it; `start` raises nothing."""
    cases: list[dict[str, Any]] = [{}, {"block_size": 16}, {"encoding": "pack"}]
    for number, terms in enumerate(cases):
        config = config_with(tmp_path / f"{number}", **terms)
        start(config)
        assert checked(config, tmp_path) == []


@pytest.mark.parametrize("terms", [{"by_layer": True}, {"block_size": 128}], ids=str)
def test_models_with_windows_have_one_verdict(terms: dict[str, Any], tmp_path: Path) -> None:
    config = right(staging=1 << 20, host=1 << 20, **terms)
    start(config | {"kv_connector_extra_config": {"staging": 1 << 20, "host": 1 << 20}}, WINDOWS)
    with pytest.raises(PortaKVError):
        start(config, WINDOWS)
    assert checked(config, tmp_path, WINDOWS) != []


@pytest.mark.parametrize(("room", "starts"), [(0, True), (-1, False)])
def test_a_block_fits_or_not_to_the_byte(room: int, starts: bool, tmp_path: Path) -> None:
    """A stored block has 64 tokens of 128 bytes, and a header of 4,096 bytes."""
    image = 4096 + 64 * (2 * HEADS * DIM * 2)
    for name in ("staging", "capacity"):
        config = config_with(tmp_path / name, block_size=64, **{name: image + room})
        assert (checked(config, tmp_path) == []) == starts
        if starts:
            start(config)
            continue
        with pytest.raises(PortaKVError, match="have room for a block"):
            start(config)


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_wrong_keys_are_errors(name: str, tmp_path: Path) -> None:
    config = {**right(host=1 << 20, staging=1 << 20), **WRONG_KEYS[name]}
    assert checked(config, tmp_path) != []


def test_a_key_of_another_release_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases of vLLM before 0.32 have kv_rank, and the installed one has not."""
    config = {**right(host=1 << 20, staging=1 << 20), "kv_rank": 0}
    assert connector_findings_of(config).errors == [] or find_spec("vllm") is not None
    monkeypatch.syspath_prepend(str(tmp_path))
    write_vllm(tmp_path)
    module = tmp_path / "vllm/config"
    module.mkdir()
    (module / "__init__.py").touch()
    names = "".join(f"    {name}: object = None\n" for name in right())
    (module / "kv_transfer.py").write_text(f"class KVTransferConfig:\n{names}")
    for each in (config, {**config, "kv_connector": "OffloadingConnector"}):
        errors = connector_findings_of(each).errors
        others = [error for error in errors if "which other releases have" in error]
        assert [error.split(", ")[1] for error in others] == ["got 'kv_rank'"]


@pytest.mark.parametrize("name", WRONG_TERMS)
def test_the_doctor_says_what_it_did_not_check(name: str, tmp_path: Path) -> None:
    """Without the model and the block size it may not know, and does not say that vLLM starts."""
    config = config_with(tmp_path / "kv", **WRONG_TERMS[name])
    found = connector_findings_of(config)
    assert found.errors or found.unchecked
    ran = run("doctor", "--kv-transfer-config", json.dumps(config))
    assert "vLLM starts with this configuration" not in ran.out
    assert any("Pass --model" in each for each in found.unchecked)


def test_a_block_size_that_vllm_may_choose_is_not_checked(tmp_path: Path) -> None:
    found = connector_findings_of(right(host=1 << 20, staging=1 << 20, block_size=48))
    assert found.errors == []
    assert any("Pass --block-size" in each for each in found.unchecked)
    found = connector_findings_of(right(host=1 << 20, staging=1 << 20, block_size=48), None, 16)
    assert found.errors == []
    assert not any("Pass --block-size" in each for each in found.unchecked)
    found = connector_findings_of(right(host=1 << 20, staging=1 << 20, block_size=50))
    (error,) = found.errors
    assert "Pass --block-size as vLLM has it" in error
    assert connector_findings_of(right(host=1 << 20, block_size=50), None, 100).errors == []
