# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector: what it reads of an engine, and walks through its hooks without vLLM."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.vllm_stub import configuration, write_vllm

from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.integrations.vllm_caches import (
    groups_of,
    is_served,
    salt_of,
    settings_of,
    view_of,
    warn_of_policy,
)
from portakv.serving import Group

TESTS = Path(__file__).resolve().parents[1]


def test_walks_through_the_hooks_of_an_engine(tmp_path: Path) -> None:
    """Rows of real caches; requests come, load, run, are preempted, end and are aborted."""
    write_vllm(tmp_path)
    paths = [str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "support.vllm_hooks", str(tmp_path), "0", "40"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = ast.literal_eval(done.stdout)
    assert counts["saves"] > 100
    assert counts["landed_blocks"] > 10


@pytest.fixture
def configurations(tmp_path: Path) -> tuple[Any, Any]:
    return configuration(str(tmp_path / "store"), "engine", 8, 16)


def test_what_a_configuration_says(configurations: tuple[Any, Any], tmp_path: Path) -> None:
    settings = settings_of(*configurations)
    assert settings.engine == "engine"
    assert settings.model == f"model:None:None:auto:{sha256(b'').hexdigest()[:16]}"
    assert settings.block_size == 16
    assert settings.store.folder == str(tmp_path / "store")
    assert groups_of(configurations[1]) == [Group(16)]


def test_several_workers_are_refused(configurations: tuple[Any, Any]) -> None:
    configurations[0].parallel_config.world_size = 2
    with pytest.raises(IntegrationError, match=r"Expected one worker .*, got 2"):
        settings_of(*configurations)


def test_kinds_of_layers_that_are_not_served_are_named(configurations: tuple[Any, Any]) -> None:
    class MambaSpec(SimpleNamespace):
        pass

    groups = configurations[1].kv_cache_groups
    groups.append(SimpleNamespace(kv_cache_spec=MambaSpec(block_size=16)))
    with pytest.raises(IntegrationError, match="got FullAttentionSpec, MambaSpec"):
        settings_of(*configurations)


def test_wrong_terms_are_refused_by_name(configurations: tuple[Any, Any], tmp_path: Path) -> None:
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["fodler"] = "x"
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .* got 'fodler'"):
        settings_of(*configurations)
    del terms["fodler"]
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    terms["folder"] = str(open_folder)
    with pytest.raises(InvalidTerms, match="only this user may write"):
        settings_of(*configurations)


@pytest.mark.parametrize("first", [True, False], ids=["blocks first", "keys and values first"])
def test_a_view_of_pages(first: bool) -> None:
    """Each block of a layer moves whole; layers that share a tensor count once."""
    _, caches = configuration("", "engine", 8, 16)
    shape = (8, 4, 16, 64) if first else (2, 8, 16, 4, 32)
    tensors = [torch.zeros(shape) for _ in range(3)]
    named = {"a": tensors[0], "b": tensors[1], "c": tensors[2], "d": tensors[0]}
    view, _ = view_of(named, caches)
    assert view.layers == 3
    assert view.opaque
    assert view.block_size == 16
    assert view.slots == 8 * 16


def test_caches_without_an_axis_of_blocks_are_refused() -> None:
    _, caches = configuration("", "engine", 8, 16)
    with pytest.raises(IntegrationError, match=r"got \[4, 8, 16\]"):
        view_of({"a": torch.zeros(4, 8, 16)}, caches)
    with pytest.raises(IntegrationError, match="of one shape"):
        view_of({"a": torch.zeros(8, 16), "b": torch.zeros(8, 8)}, caches)


@pytest.mark.parametrize(("policy", "lines"), [("fail", 1), ("recompute", 0)])
def test_a_policy_that_ends_requests_is_warned_of(
    policy: str, lines: int, configurations: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    configurations[0].kv_transfer_config.kv_load_failure_policy = policy
    warn_of_policy(configurations[0])
    assert caplog.text.count("kv_load_failure_policy") == lines


def request(**terms: Any) -> Any:
    return SimpleNamespace(**{"cache_salt": None, "lora_request": None, "mm_features": [], **terms})


def test_salts_and_adapters_keep_blocks_apart() -> None:
    plain = salt_of(request())
    salted = salt_of(request(cache_salt="a"))
    adapted = salt_of(request(lora_request=SimpleNamespace(lora_name="a")))
    assert plain == b""
    assert len({plain, salted, adapted}) == 3


@pytest.mark.parametrize(
    "terms",
    [{"prompt_embeds": torch.zeros(1)}, {"mm_features": [object()]}, {"resumable": True}],
    ids=["embeddings", "images", "sessions"],
)
def test_requests_of_more_than_tokens_are_left_to_the_engine(terms: dict[str, Any]) -> None:
    assert is_served(request())
    assert not is_served(request(**terms))


def test_an_adapter_of_another_path_has_other_blocks() -> None:
    salts = {
        salt_of(request(lora_request=SimpleNamespace(lora_name="a", lora_path=path)))
        for path in ("/one", "/two")
    }
    assert len(salts) == 2


def test_a_page_is_read_in_the_order_of_its_memory() -> None:
    """vLLM names heads before tokens, also where tokens come first in memory."""
    _, caches = configuration("", "engine", 8, 16)
    by_token = torch.arange(8 * 16 * 4 * 6).view(8, 16, 4, 6).transpose(1, 2)
    view, order = view_of({"a": by_token}, caches)
    (tensor,) = [view.tensors] if isinstance(view.tensors, torch.Tensor) else view.tensors
    assert tensor.is_contiguous()
    by_head = torch.arange(8 * 16 * 4 * 6).view(8, 4, 16, 6)
    assert view_of({"a": by_head}, caches)[1] != order


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"data_parallel_size": 2}, "got 2"),
        ({"distributed_executor_backend": "mp"}, "executor 'mp'"),
    ],
)
def test_engines_of_several_processes_are_refused(
    terms: dict[str, Any], says: str, configurations: tuple[Any, Any]
) -> None:
    vars(configurations[0].parallel_config).update(terms)
    with pytest.raises(IntegrationError, match=says):
        settings_of(*configurations)


def test_layers_that_look_ahead_are_refused(configurations: tuple[Any, Any]) -> None:
    configurations[1].kv_cache_groups[0].kv_cache_spec.non_causal = True
    with pytest.raises(IntegrationError, match="Expected causal attention"):
        settings_of(*configurations)
