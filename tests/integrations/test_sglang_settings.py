# SPDX-License-Identifier: Apache-2.0
"""PortaKV as SGLang's storage backend: its configuration, and its hooks without SGLang."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import ready
from support.sglang_stub import configuration, write_sglang
from support.waits import LIMIT

from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.integrations.sglang.pools import KV, OTHERS, settings_of, terms_of

TESTS = Path(__file__).resolve().parents[1]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that finds the stand-in in a folder."""
    paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return ready.run(*words, env=environment, timeout=LIMIT)


def test_a_walk_through_the_hooks(tmp_path: Path) -> None:
    write_sglang(tmp_path / "engine")
    done = run(tmp_path / "engine", "-m", "support.sglang_hooks", str(tmp_path))
    assert done.stdout.strip().splitlines()[-1:] == ["right"], done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("without", ["batch_get_v1", "on_host_pools_registered"])
def test_a_release_without_the_interface(without: str, tmp_path: Path) -> None:
    """It is named when SGLang imports the backend."""
    write_sglang(tmp_path, without)
    done = run(tmp_path, "-c", "import portakv.integrations.sglang.hicache")
    assert done.returncode == 1
    assert f"HiCacheStorage.{without}" in done.stderr.strip().splitlines()[-1]


def test_the_folder_of_each_process() -> None:
    """Ranks have separate folders, and pages with the ranks that they depend on."""
    terms = {"folder": ["/nvme0/kv", "/nvme1/kv"], "host": 0}
    first = settings_of(configuration(terms))
    second = settings_of(configuration(terms, tp_rank=1, tp_size=2))
    third = settings_of(configuration(terms, tp_rank=1, tp_size=2, dp_rank=1))
    folders = {each.store.folders for each in (first, second, third)}
    assert len(folders) == 3
    assert all(len(each) == 2 for each in folders)
    assert second.ranks_of(KV) == third.ranks_of(KV) != first.ranks_of(KV)


def test_the_folder_of_ranks_that_share() -> None:
    """Ranks of one stage have one folder, and stages have separate ones."""
    terms = {"folder": "/nvme0/kv", "shared": True}
    ranks = [
        settings_of(configuration(terms, tp_rank=rank, tp_size=2, is_mla_model=True))
        for rank in range(2)
    ]
    assert len({each.store.folders for each in ranks}) == 1
    stages = [settings_of(configuration(terms, pp_rank=rank, pp_size=2)) for rank in range(2)]
    assert len({each.store.folders for each in stages}) == 2


def test_ranks_with_the_same_pages() -> None:
    """Of MLA those of keys and values are the same, and those of states are not."""
    terms = {"bucket": "memory://", "host": 0}
    ranks = [
        settings_of(configuration(terms, tp_rank=rank, tp_size=2, is_mla_model=True))
        for rank in range(2)
    ]
    assert len({each.ranks_of(KV) for each in ranks}) == 1
    assert len({each.ranks_of("mamba") for each in ranks}) == 2
    stages = [settings_of(configuration(terms, pp_rank=rank, pp_size=2)) for rank in range(2)]
    assert len({each.ranks_of(KV) for each in stages}) == 2


WRONG: dict[str, tuple[Any, str]] = {
    "no terms": (None, "'portakv'"),
    "a text": ("/nvme0/kv", "'portakv'"),
    "an unknown term": (
        {"floder": "/nvme0/kv"},
        r"some of folder, capacity, host, staging, deadline, shared, bucket, bucket_options, got "
        r"'floder'. Did you mean folder\?",
    ),
    "no tier": ({"host": 0}, "host tier"),
    "a wrong value": ({"folder": "/nvme0/kv", "capacity": -1}, "capacity"),
}


@pytest.mark.parametrize(("terms", "message"), WRONG.values(), ids=WRONG)
def test_wrong_terms(terms: Any, message: str) -> None:
    with pytest.raises(InvalidTerms, match=message):
        terms_of({"portakv": terms})
    with pytest.raises(InvalidTerms, match=message):
        settings_of(configuration(terms))


@pytest.mark.parametrize("empty", [None, False, 0, ""], ids=repr)
@pytest.mark.parametrize("name", OTHERS)
def test_terms_without_a_use_may_be_empty(name: str, empty: object) -> None:
    """A configuration that other engines share may have them."""
    terms = {"folder": "/nvme0/kv", "host": 0}
    assert terms_of({"portakv": {**terms, name: empty}}) == terms_of({"portakv": terms})


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shared, and a bucket": ({"shared": True, "bucket": "memory://"}, {}, "shared"),
    "shared memory alone": ({"shared": True, "folder": None}, {}, "shared"),
    "blocks of another size": ({"block_size": 64}, {}, "block_size"),
    "layer by layer": ({"by_layer": True}, {}, "by_layer"),
    "packed": ({"encoding": "pack"}, {}, "encoding"),
    "pages that are divided": ({}, {"should_split_heads": True}, "tp_lcm_size"),
    "MLA's ranks alone": ({}, {"is_mla_model": True, "tp_size": 2}, "shared, or a bucket"),
}


@pytest.mark.parametrize(("more", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(more: dict[str, Any], config: dict[str, Any], message: str) -> None:
    terms = {"folder": "/nvme0/kv", **more}
    with pytest.raises(IntegrationError, match=message):
        settings_of(configuration(terms, **config))


def test_a_configuration_without_an_extra() -> None:
    with pytest.raises(InvalidTerms, match="'portakv'"):
        settings_of(configuration(None, extra_config=None))
