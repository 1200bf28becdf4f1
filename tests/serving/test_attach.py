# SPDX-License-Identifier: Apache-2.0
"""Engines that attach to the store server of a folder, and never take the folder over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.store_server_host import KEYS, caches, same
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms
from portakv.integrations.vllm.check import findings_of
from portakv.serving import StoreClient, StoreServer, StoreTerms
from portakv.storage import BlockForm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def server(folder: Path) -> StoreServer:
    """Return what `portakv store serve FOLDER` makes."""
    terms = {"host": 1 << 20, "staging": 1 << 20, "capacity": 8 << 20}
    return StoreServer(StoreTerms(str(folder), **terms))  # type: ignore[arg-type]


def engine(folder: Path, shared: Any) -> StoreServer:
    """Return what an engine with these terms makes."""
    sizes = {"host": 1 << 20, "staging": 1 << 20, "capacity": 8 << 20}
    return StoreServer(StoreTerms(str(folder), shared=shared, **sizes), "engine")  # type: ignore[arg-type]


def test_a_server_that_restarts_serves_again(stack: ExitStack, tmp_path: Path) -> None:
    """The engine begins first, so that it could have the folder, and stays while the server is
    replaced."""
    attached = stack.enter_context(engine(tmp_path, "attach"))
    assert not attached.serves
    first = stack.enter_context(server(tmp_path))
    assert first.serves
    view = caches()
    form = BlockForm.of(view, "model")
    client = stack.enter_context(StoreClient(attached.place, [form], "engine"))
    assert client.wait(LIMIT)
    save = client.blocks[0].save(view, range(4), KEYS[:4])
    save.synchronize(LIMIT)
    assert save.landed.all()
    first.close()
    assert until(lambda: not client.wait(0), LIMIT)
    assert not attached.serves
    second = stack.enter_context(server(tmp_path))
    assert second.serves
    assert client.wait(LIMIT)
    loaded = caches()
    load = client.blocks[0].load(loaded, range(4), KEYS[:4], deadline=LIMIT)
    load.synchronize(LIMIT)
    assert load.landed.all()
    assert same(loaded, view, 4)
    assert not attached.serves


def test_control_of_an_engine_that_shares(stack: ExitStack, tmp_path: Path) -> None:
    """It has the folder, and the server stands by."""
    assert stack.enter_context(engine(tmp_path, True)).serves
    assert not stack.enter_context(server(tmp_path)).serves


@pytest.mark.parametrize("shared", ["attached", 1, None])
def test_other_values_are_refused(shared: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidTerms, match='shared to be True, False or "attach"'):
        StoreTerms(str(tmp_path), shared=shared)


def test_attaching_needs_a_folder() -> None:
    with pytest.raises(InvalidTerms, match='a folder for shared="attach", got none'):
        StoreTerms(shared="attach")


def test_the_recipe_for_nodes_leaves_serving_to_the_server() -> None:
    """Engines read the file that the image has at the place which the resources name."""
    config = json.loads((ROOT / "deploy" / "kv-node.json").read_text("utf-8"))
    terms = StoreTerms.of(config["kv_connector_extra_config"])
    assert terms.attaches
    resources = (ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8")
    assert "value: /etc/portakv/kv-node.json\n" in resources
    assert f"command: [portakv, store, serve, {terms.folder}]" in resources
    image = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    assert "COPY deploy/kv.json deploy/kv-node.json /etc/portakv/\n" in image
    assert findings_of(config).errors == []
