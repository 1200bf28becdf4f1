# SPDX-License-Identifier: Apache-2.0
"""The check of a `--kv-transfer-config`, with a stand-in of vLLM or without vLLM."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.command_line import run, run_json
from support.kv_transfer import right
from support.released_models import MODELS
from support.vllm_stub import BASE as STUB
from support.vllm_stub import write_vllm

from portakv.integrations.interfaces import lacks
from portakv.integrations.vllm.check import (
    BASE,
    HOOKS,
    SPEC,
    TIER_MODULE,
    connector_findings_of,
    findings_of,
)
from portakv.serving.sizing import CHUNK, FULL, STATE, WINDOW, sizes_of

#: The last line of a check that has warnings and no errors.
NO_ERROR = "No error was found in this configuration. See the warnings above."
#: The last line of a check that leaves something out.
UNCHECKED = "No error was found in this configuration. See above what was not checked."
#: The configurations of real models, as far as they decide what a row takes.
LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def test_a_right_configuration_has_no_errors(tmp_path: Path) -> None:
    terms = {"folder": str(tmp_path / "kv"), "capacity": 1 << 20, "host": 1 << 20}
    found = findings_of(right(staging=1 << 20, **terms))
    assert found.errors == []
    assert [each for each in found.warnings if "vllm is not installed" not in each] == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_rol": "kv_both"}, "got 'kv_rol'. Did you mean kv_role?"),
        ({"kv_role": "kv_neither"}, "or 'kv_both', got 'kv_neither'"),
        (
            {"kv_role": "kv_consumer", "kv_connector_extra_config": {"hand_over": {"leese": 1}}},
            "in hand_over, got 'leese'",
        ),
        (
            {"kv_connector_extra_config": {"hand_over": {"transport": "rdma"}}},
            "hand_over: Expected transport to be",
        ),
        (
            {"kv_connector_extra_config": {"hand_over": {"secret_file": "/nowhere"}}},
            "hand_over: Expected secret_file to be a file, got '/nowhere'",
        ),
        ({"kv_connector": "PortaKV"}, "Expected kv_connector to be 'PortaKVConnector'"),
        ({"kv_connector_module_path": None}, "Expected kv_connector_module_path"),
        ({"kv_connector_extra_config": {"foler": "x"}}, "got 'foler'"),
        ({"kv_connector_extra_config": {"encoding": "zip"}}, "Expected encoding to be 'pack'"),
        ({"kv_connector_extra_config": {"encoding": "auto"}}, "got 'auto': packed blocks have"),
        (
            {"kv_connector_extra_config": {"encoding": "pack", "by_layer": True}},
            "Expected by_layer without an encoding",
        ),
        ({"kv_connector_extra_config": 5}, "Expected kv_connector_extra_config to be an object"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    found = findings_of({**right(), **change})
    assert any(says in each for each in found.errors)


@pytest.mark.parametrize(
    ("role", "terms", "notes"),
    [
        ("kv_producer", {}, ["offers the rows of prompts that it computes", "stores no blocks"]),
        ("kv_consumer", {}, ["pulls the rows of prompts", "stores no blocks"]),
        ("kv_both", {"hand_over": {}}, ["and pulls those of other engines", "uses its store"]),
    ],
)
def test_what_is_handed_over_is_noted(role: str, terms: dict[str, Any], notes: list[str]) -> None:
    found = findings_of({**right(**terms), "kv_role": role})
    assert found.errors == []
    for note in notes:
        assert any(note in each for each in found.notes)


def test_a_store_alone_hands_nothing_over() -> None:
    note = "This engine hands no prompt over to another engine"
    assert any(note in each for each in findings_of(right()).notes)
    assert not any(note in each for each in findings_of(right(hand_over={})).notes)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (LLAMA_8B, False),
        ({**LLAMA_8B, "sliding_window": 4096}, False),
        ({**LLAMA_8B, "layer_types": ["full_attention", "sliding_attention"] * 16}, False),
        ({**LLAMA_8B, "layer_types": ["linear_attention", "full_attention"] * 16}, False),
        ({**LLAMA_8B, "layer_types": ["linear_attention"] * 32}, True),
    ],
)
def test_models_whose_requests_are_not_handed_over(model: dict[str, Any], refused: bool) -> None:
    sizes = sizes_of(model)
    found = findings_of(right(hand_over={}), sizes)
    assert any("got states alone" in each for each in found.errors) == refused
    assert not any("states alone" in each for each in findings_of(right(), sizes).errors)


def test_peers_are_those_of_an_engine_that_pulls(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("f" * 64)
    secret.chmod(0o600)
    peers = ["tcp://127.0.0.1:5600", "tcp://127.0.0.1:5601"]
    terms = {"address": "tcp://127.0.0.1:0", "secret_file": str(secret), "peers": peers}
    note = "It connects to tcp://127.0.0.1:5600, tcp://127.0.0.1:5601 when it starts."
    warning = "peers has no effect on an engine that pulls no rows"
    for role, pulls in (("kv_consumer", True), ("kv_both", True), ("kv_producer", False)):
        found = findings_of({**right(hand_over=terms), "kv_role": role})
        assert found.errors == []
        assert (note in found.notes) == pulls
        assert any(warning in each for each in found.warnings) != pulls
    found = findings_of(right(hand_over={**terms, "peers": ["tcp://127.0.0.1:0"]}))
    assert any("Expected each of peers to be" in each for each in found.errors)


def test_a_lease_that_ends_before_a_pull_is_warned_of() -> None:
    found = findings_of(right(hand_over={"lease": 5.0, "timeout": 6.0}))
    assert any("timeout is 6 s, longer than the lease of 5 s" in each for each in found.warnings)
    found = findings_of(right(hand_over={"lease": 6.0, "timeout": 6.0}))
    assert not any("timeout is" in each for each in found.warnings)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({}, "no other engine uses its store; set shared to true"),
        ({"shared": True}, "with the same folder and shared share one store"),
        ({"by_layer": True}, "by_layer serves engines with one worker"),
        ({"by_layer": "graph"}, "CUDA graphs capture the waits of layers"),
        ({"encoding": "pack"}, "--block-size 64 costs an engine less than 16"),
        ({"encoding": "pack", "block_size": 32}, "it has to be --block-size 32"),
    ],
    ids=["alone", "shared", "by layer", "in graphs", "packed", "packed in 32"],
)
def test_who_shares_a_store_is_noted(terms: dict[str, Any], says: str, tmp_path: Path) -> None:
    found = findings_of(right(folder=str(tmp_path / "kv"), **terms))
    assert any(says in each for each in found.notes)
    assert not any("shared is true" in each for each in found.warnings)


def test_a_shared_store_without_a_folder_is_warned_of() -> None:
    found = findings_of(right(shared=True))
    assert any("shared is true, and there is no folder" in each for each in found.warnings)
    assert any("The ranks of this engine share one store" in each for each in found.notes)


def test_the_sizes_of_a_server_are_not_those_of_the_engine(tmp_path: Path) -> None:
    large = {"folder": str(tmp_path), "host": 1 << 50, "capacity": 1 << 50}
    tmp_path.chmod(0o700)
    found = findings_of(right(**large, shared="attach"))
    assert found.errors == []
    assert not any("capacity" in each for each in found.warnings)
    assert any("of host memory" in each for each in findings_of(right(**large)).errors)  # control


def test_a_folder_that_does_not_exist_is_noted(tmp_path: Path) -> None:
    """A disk that is not mounted looks like one."""
    found = findings_of(right(folder=str(tmp_path / "disk/kv")))
    assert any("an engine makes it on the file system of" in each for each in found.notes)
    tmp_path.chmod(0o700)
    found = findings_of(right(folder=str(tmp_path)))
    assert not any("does not exist" in each for each in found.notes)


def test_a_folder_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir(0o700)
    (tmp_path / "same").symlink_to(folder)
    found = findings_of(right(folder=[str(folder), str(tmp_path / "same")]))
    assert any("Expected folder to be different folders" in each for each in found.errors)


def test_a_folder_that_others_may_write_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = findings_of(right(folder=str(tmp_path)))
    assert any("only this user may write" in each for each in found.errors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_load_failure_policy": "fail"}, "Set it to 'recompute'"),
        ({"kv_connector_extra_config": {}}, "There is no folder"),
        ({"kv_connector_extra_config": {"folder": "kv", "capacity": 1 << 60}}, "the file system"),
    ],
)
def test_what_a_user_may_not_want_is_a_warning(change: dict[str, Any], says: str) -> None:
    found = findings_of({**right(), **change})
    assert found.errors == []
    assert any(says in each for each in found.warnings)


def test_a_bucket_that_answers_has_no_warning(tmp_path: Path) -> None:
    found = findings_of(right(host=0, bucket=f"file://{tmp_path / 'b'}"), sizes_of(LLAMA_8B))
    assert found.errors == []
    assert not any("bucket" in each or "no folder" in each for each in found.warnings)
    assert any("the bucket as many as its own rules keep" in each for each in found.notes)


def test_a_bucket_that_is_down_is_a_warning() -> None:
    with socket.socket() as unheard:  # refuses connections
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        options = {"endpoint": url, "skip_signature": True, "client_options": {"allow_http": True}}
        found = findings_of(right(bucket="s3://b/kv", bucket_options=options))
    assert found.errors == []
    assert any("The bucket s3://b/kv does not answer here" in each for each in found.warnings)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"bucket": "s3://a:SECRET@b"}, "Pass credentials by the environment"),
        ({"bucket": "s3://b", "bucket_options": {"access_key_id": "SECRET"}}, "'access_key_id'"),
        ({"bucket": "nothing://SECRET"}, "Expected a url"),
        ({"bucket": "s3://b", "bucket_options": {"colour": "SECRET"}}, "Expected"),
    ],
)
def test_a_wrong_bucket_is_an_error_without_its_secrets(terms: dict[str, Any], says: str) -> None:
    config = json.dumps(right(**terms))
    ran = run("doctor", "--kv-transfer-config", config)
    assert ran.code == 1
    said = " ".join(ran.out.split())
    assert says in said
    if "nothing" not in terms["bucket"]:
        assert "SECRET" not in said.replace("AWS_SECRET_ACCESS_KEY", "")


def test_staging_is_compared_with_the_model() -> None:
    sizes = sizes_of(LLAMA_8B)
    small = findings_of(right(staging=1 << 20, block_size=64), sizes)
    assert any("staging to have room for a block of 8392704 bytes" in x for x in small.errors)
    assert any("64 tokens of this model take 8 MiB; 2 GiB of staging" in x for x in small.errors)
    less = findings_of(right(staging=1 << 30), sizes)
    assert any("less than 2 GiB" in each for each in less.warnings)
    enough = findings_of(right(staging=4 << 30, host=1 << 30), sizes)
    assert not any("staging is" in each for each in enough.warnings)
    assert "A token takes 131,072 bytes; tokens that fit: host memory 8,192." in enough.notes


@pytest.mark.parametrize("name", MODELS)
def test_what_doctor_says_of_a_released_model(name: str, tmp_path: Path) -> None:
    """Whether its layers are served, how many there are of each kind, and their bytes."""
    model = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    config = json.dumps(right(host=1 << 30, staging=1 << 30))
    words = ("--kv-transfer-config", config, "--model", str(tmp_path), "--block-size", "16")
    ran = run("doctor", *words, "--json")
    assert ran.code == bool(model.refused)
    found = json.loads(ran.out)
    notes = "\n".join(found["notes"])
    refusals = [each for each in found["errors"] if "PortaKVConnector" in each]
    assert [model.refused in each for each in refusals] == [True] * bool(model.refused)
    assert all("OffloadingConnector" in each for each in refusals)

    counts = {FULL: model.full, WINDOW: model.window, CHUNK: model.chunk, STATE: model.states}
    for kind, many in counts.items():
        says = f"{many} with {kind}" in notes
        assert says == (many > 0 and not model.refused)
    assert (f"A token takes {model.token:,} bytes" in notes) == (model.token > 0)
    says = f"The states after a token take {model.state:,} bytes" in notes
    assert says == (model.state > 0 and model.token > 0)
    unknown = [each for each in found["unchecked"] if "sizes of the model's rows" in each]
    if model.unknown:
        assert model.unknown in unknown[0]
    else:
        assert bool(unknown) == (model.refused != "" and model.token == 0)
    warned = any("keep an index next to their rows" in each for each in found["warnings"])
    assert warned == (model.indexed > 0)


def test_layers_with_an_index_are_stored_by_one_worker() -> None:
    """A model such as DeepSeek V3.2 starts with it; what it cannot have is an error."""
    index = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_topk": 2048, "index_head_dim": 128}
    sizes = sizes_of({**LLAMA_8B, **index})
    found = findings_of(right(), sizes)
    assert found.errors == []
    assert any("need keys of 8 bits" in each for each in found.warnings)
    assert not any("an index" in each for each in findings_of(right()).warnings)
    assert findings_of(right(hand_over={}), sizes).errors == []
    assert findings_of(right(shared=True), sizes).errors == []
    (error,) = findings_of(right(by_layer=True), sizes).errors
    assert "Expected no by_layer for a model of which 32 layers" in error


def test_layers_with_an_index_of_another_kind_are_stored_by_one_worker() -> None:
    sizes = sizes_of(MODELS["MiniMax M3"].config)
    found = findings_of(right(), sizes)
    assert found.errors == []
    assert any("with several ranks and a store" in each for each in found.warnings)
    for term in ({"shared": True}, {"by_layer": True}):
        (error,) = findings_of(right(**term), sizes).errors
        assert f"Expected no {', '.join(term)} for a model of which 57 layers" in error


def test_a_model_with_states_is_described() -> None:
    """With where a hit can end; what its states cannot be stored by is an error."""
    states = {
        "layer_types": ["linear_attention", "full_attention"] * 16,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    sizes = sizes_of({**LLAMA_8B, **states})
    found = findings_of(right(host=1 << 30, staging=1 << 30), sizes)
    assert found.errors == []
    text = "\n".join(found.notes)
    assert "16 with a state instead of rows of tokens, 16 with rows of all tokens" in text
    assert "A hit ends where vLLM has kept a state." in text
    assert (
        f"The states after a token take {16 * (3 * 6144 * 2 + 16 * 128 * 128 * 2):,} bytes" in text
    )
    (error,) = findings_of(right(bucket="memory:///", host=1 << 30, shared=True), sizes).errors
    assert "Expected no bucket in the store of a host" in error


def test_blocks_of_a_machine_whose_torch_only_names_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stored block on a CPU is one of vLLM's, and has 64 tokens or more on an accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = {**LLAMA_8B, "layer_types": ["conv", "attention"] * 16, "conv_L_cache": 3}
    notes = findings_of(right(host=1 << 30, staging=1 << 30), sizes_of(config)).notes
    assert any("those of one block of 16 tokens or more" in each for each in notes)


def test_a_model_that_is_not_known_gives_no_size() -> None:
    found = findings_of(right(host=1 << 25), sizes_of({**LLAMA_8B, "kv_new": 2}))
    assert found.errors == []
    assert any("keys that may change its rows: kv_new" in each for each in found.unchecked)
    assert not any("A token takes" in each for each in found.notes)


def test_scales_in_a_separate_file_are_read(tmp_path: Path) -> None:
    """As vLLM reads them, the cache then has numbers of 8 bits."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = json.dumps(right(host=1 << 25))
    options = ("doctor", "--kv-transfer-config", config, "--model", str(tmp_path))
    assert any("A token takes 131,072 bytes" in each for each in run_json(*options)["notes"])
    scales = {"producer": {}, "quantization": {"kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(scales))
    assert any("A token takes 65,536 bytes" in each for each in run_json(*options)["notes"])


def test_hooks_that_a_release_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in of vLLM has few of them; it is not imported."""
    write_vllm(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    absent = lacks(HOOKS)
    assert f"{BASE}:SupportsHMA" not in absent
    assert f"{BASE}:KVConnectorBase_V1.on_new_request" in absent
    assert lacks(["vllm.nothing:here"]) == ["vllm.nothing:here"]
    found = findings_of(right())
    assert any("no KVConnectorBase_V1.on_new_request" in each for each in found.errors)
    assert any("without figures for Prometheus" in each for each in found.notes)


def write_whole_vllm(folder: Path) -> None:
    """Write the stand-in of vLLM with each hook that the connector needs."""
    write_vllm(folder)
    names = [hook.rpartition(".")[2] for hook in HOOKS if "KVConnectorBase_V1." in hook]
    methods = "".join(f"    def {name}(self):\n        return None\n\n" for name in names)
    head = "class KVConnectorBase_V1:\n"
    classes = folder / STUB
    classes.write_text(classes.read_text().replace(head, head + methods))


def last_line(out: str) -> str:
    return out.splitlines()[-1]


def test_doctor_says_that_an_engine_starts_only_if_nothing_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole_vllm(tmp_path / "engine")
    monkeypatch.syspath_prepend(str(tmp_path / "engine"))
    terms = {"folder": str(tmp_path / "kv"), "capacity": 16 << 20, "host": 1 << 20}
    config = json.dumps(right(staging=2 << 30, **terms))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    ran = run("doctor", "--kv-transfer-config", config, "--model", str(tmp_path))
    assert ran.code == 0
    assert "warning:" not in ran.out
    assert last_line(ran.out) == "vLLM starts with this configuration, and uses PortaKV."

    unchecked = run("doctor", "--kv-transfer-config", config)
    assert unchecked.code == 0
    assert "not checked: The model" in unchecked.out
    assert last_line(unchecked.out) == UNCHECKED

    no_folder = json.dumps(right(host=1 << 20, staging=1 << 20))
    warned = run("doctor", "--kv-transfer-config", no_folder)
    assert warned.code == 0
    assert "warning: There is no folder" in warned.out
    assert last_line(warned.out) == NO_ERROR


def test_doctor_does_not_say_that_a_missing_or_old_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"folder": str(tmp_path / "kv"), "capacity": 1 << 20, "host": 1 << 20}
    config = json.dumps(right(staging=1 << 20, **terms))
    if find_spec("vllm") is None:
        ran = run("doctor", "--kv-transfer-config", config)
        assert ran.code == 0
        assert "vllm is not installed" in " ".join(ran.out.split())
        assert last_line(ran.out) == NO_ERROR
    write_whole_vllm(tmp_path / "engine")
    metadata = tmp_path / "engine/vllm-0.33.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("0.33.0", "0.9.0"))
    monkeypatch.syspath_prepend(str(tmp_path / "engine"))
    old = run("doctor", "--kv-transfer-config", config)
    assert old.code == 0
    assert "vllm 0.9.0 is installed" in " ".join(old.out.split())
    assert last_line(old.out) == NO_ERROR


MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
TIERS = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {
        "spec_name": SPEC,
        "spec_module_path": TIER_MODULE,
        "cpu_bytes_to_use": 2 * MEMORY,
        "secondary_tiers": [],
    },
}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (right(host=2 * MEMORY), "by host and staging, and this machine has"),
        (
            TIERS,
            "by cpu_bytes_to_use and the host and staging of tiers, and",
        ),
    ],
    ids=["a store", "vLLM's tier"],
)
def test_more_memory_than_the_machine_has_is_an_error(config: Any, says: str) -> None:
    text = json.dumps(config)
    ran = run("doctor", "--kv-transfer-config", text)
    assert ran.code == 1
    assert says in " ".join(ran.out.split())
    assert last_line(ran.out).startswith("vLLM would not start with this configuration")
    as_json = run("doctor", "--kv-transfer-config", text, "--json")
    assert as_json.code == 1
    found = json.loads(as_json.out)
    assert any("this machine has" in each for each in found["errors"])
    assert not any("this machine has" in each for each in found["warnings"])


PAGES = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_quotes_what_doctor_prints() -> None:
    text = " ".join((PAGES / "engines/vllm.md").read_text(encoding="utf-8").split())
    assert "vLLM starts with this configuration, and uses PortaKV." in text
    assert NO_ERROR in text
    assert UNCHECKED in text
    assert "vLLM would not start with this configuration, or not use PortaKV." in text


class Saved:
    """Stands for a model of transformers, of which only the configuration is written."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def to(self, _: torch.dtype) -> Saved:
        return self

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))


def test_the_tutorial_of_a_hybrid_quotes_what_doctor_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is that of the example, whose sizes decide each number."""
    made = ModuleType("transformers")
    usual = {"model_type": "qwen3_next", "linear_conv_kernel_dim": 4, "dtype": "bfloat16"}
    vars(made)["Qwen3NextConfig"] = lambda **terms: usual | terms
    vars(made)["Qwen3NextForCausalLM"] = Saved
    monkeypatch.setitem(sys.modules, "transformers", made)
    runpy.run_path(str(PAGES.parent / "examples/vllm_tiers.py"))["make_hybrid"](tmp_path / "model")
    page = (PAGES / "engines/hybrid.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^note: (.*)$", page, re.MULTILINE)
    assert len(lines) == 3

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kv").mkdir(mode=0o700)
    found = run_json("doctor", "--kv-transfer-config", config, "--model", "model")
    assert [each for each in lines if each not in found["notes"]] == []
    assert found["errors"] == []


def test_doctor_checks_a_text_and_a_file(tmp_path: Path) -> None:
    text = json.dumps(right(folder=str(tmp_path / "kv"), capacity=1 << 30, host=1 << 20))
    said = run("doctor", "--kv-transfer-config", text)
    assert said.code == 0
    assert "error:" not in said.out
    wrong = run("doctor", "--kv-transfer-config", '{"kv_role": "both"}')
    assert wrong.code == 1
    assert "got 'both'" in " ".join(wrong.out.split())
    file = tmp_path / "config.json"
    file.write_text(text)
    assert run_json("doctor", "--kv-transfer-config", str(file))["errors"] == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_8B))
    for model in ("model", "model/config.json"):
        words = ("doctor", "--kv-transfer-config", str(file), "--model", str(tmp_path / model))
        assert any("131,072 bytes" in each for each in run_json(*words)["notes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kv-transfer-config", "/nowhere"), "JSON or the path of a file"),
        (("--kv-transfer-config", "{"), "to be JSON, got an error"),
        (("--kv-transfer-config", "[]"), "to be a JSON object, got a list"),
        (("--kv-transfer-config", "5"), "to be a JSON object, got an int"),
        (("--kv-transfer-config", '"x"'), "to be a JSON object, got a str"),
        (("--l2-adapter", "[]"), "to be a JSON object, got a list"),
        (("--hicache-config", " []"), "to be a JSON object, got a list"),
        (("--kv-transfer-config", "{}", "--model", "/nowhere"), "a folder with a config.json"),
        (("--model", "/nowhere"), "next to --model"),
        (("--block-size", "16"), "next to --block-size"),
        (("--kv-transfer-config", "{}", "--block-size", "0"), "--block-size to be a whole number"),
    ],
)
def test_doctor_refuses_what_it_cannot_read(words: tuple[str, ...], says: str) -> None:
    ran = run("doctor", *words)
    assert ran.code == 1
    assert says in ran.err


def test_doctor_refuses_a_file_that_is_not_an_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[]")
    assert "got a list" in run("doctor", "--kv-transfer-config", str(file)).err


def test_the_doctor_reads_the_witness_and_what_it_wraps() -> None:
    config = {
        "kv_connector": "PortaKVWitness",
        "kv_connector_module_path": "portakv.integrations.vllm.witness",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connector": "PortaKVConnector",
            "connector_module_path": "portakv.integrations.vllm_connector",
            "connector_extra_config": {"host": 1 << 20, "staging": 1 << 20},
            "action": "recompute",
        },
    }
    found = connector_findings_of(config)
    assert found.errors == []
    assert any("compares a part of 0.0625" in note for note in found.notes)
    extra: dict[str, Any] = config["kv_connector_extra_config"]  # type: ignore[assignment]
    inner = {**config, "kv_connector_extra_config": {**extra, "connector_extra_config": {"hst": 1}}}
    (error,) = connector_findings_of(inner).errors
    assert error.startswith("PortaKVConnector: ")
    (error,) = connector_findings_of({**config, "kv_load_failure_policy": "fail"}).errors
    assert "Set it to 'recompute'" in error
    assert connector_findings_of({**config, "kv_connector": "Witness"}).errors
