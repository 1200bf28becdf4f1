# SPDX-License-Identifier: Apache-2.0
"""LMCache's MP server with PortaKV's L2 adapter, which its configuration alone chooses.

Its host memory has room for a part of the objects. A test of a fault asks that the server answers
with the right rows or with none, and its control that the rows are wrong without the guard.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("lmcache") is None:
    pytest.skip("LMCache is not installed; see .ci/plugs", allow_module_level=True)
pytest.importorskip("blake3", reason="LMCache's MP server needs blake3")
pytest.importorskip(
    "lmcache.v1.multiprocess.transport", reason="the client of this release is another one"
)

from support.faulty_io import VARIABLE, set_fault
from support.lmcache_server import NBYTES, OBJECTS, Server, right, serving
from support.waits import LIMIT, until

from portakv.serving.pages import PageSize

#: More objects than the server's host memory has room for.
PROMPTS = 24
#: Without it a read trusts whatever the disk returns.
UNGUARDED = """
from support.store_damage import any_images_believed
believed = any_images_believed()
believed.__enter__()
"""
FAULTY = "import os; os.environ['PORTAKV_IO'] = 'support.faulty_io:Faulty'"


def adapter_of(folder: Path, **terms: Any) -> dict[str, Any]:
    """Return the line of configuration."""
    params = {"folder": str(folder), "capacity": 64 << 20, "staging": 16 << 20, **terms}
    return {
        "type": "plugin",
        "module_path": "portakv.integrations.lmcache_l2",
        "class_name": "PortaKVL2Adapter",
        "adapter_params": params,
    }


def store(server: Server, prompts: Iterable[int]) -> None:
    """Store prompts, and wait until L2 has each of them."""
    for prompt in prompts:

        def stored(prompt: int = prompt) -> bool:
            """LMCache may evict an object before it has offered it to L2: then store it again."""
            if len(server.fetch_from_l2(prompt)) == OBJECTS:
                return True
            server.store(prompt)
            return False

        assert until(stored, LIMIT), f"{prompt} is not stored.\n{server.text[-3000:]}"


def fetched(server: Server, prompts: Iterable[int]) -> int:
    """Return how many objects of prompts L2 has; all are right."""
    count = 0
    for prompt in prompts:
        rows = server.fetch_from_l2(prompt)
        assert right(rows, prompt), f"{prompt} is wrong"
        count += len(rows)
    return count


def wrong(server: Server, prompts: Iterable[int]) -> int:
    """Return how many of some prompts have wrong rows."""
    return sum(not right(server.fetch_from_l2(prompt), prompt) for prompt in prompts)


def test_objects_outlive_the_host_memory_and_servers(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "kv")
    known = range(PROMPTS)
    with serving(tmp_path, adapter) as server:
        store(server, known)
        assert fetched(server, known) == PROMPTS * OBJECTS
        assert server.fetch_from_l2(0, salt="another tenant") == []
        assert server.fetch_from_l2(PROMPTS) == []
        server.end()
    with serving(tmp_path, adapter) as server:
        assert fetched(server, known) == PROMPTS * OBJECTS
        for prompt in range(PROMPTS, 2 * PROMPTS):
            server.store(prompt)
        server.end(signal.SIGKILL)
    with serving(tmp_path, adapter) as server:
        assert fetched(server, known) == PROMPTS * OBJECTS
        fetched(server, range(PROMPTS, 2 * PROMPTS))
        server.end(signal.SIGKILL)


def test_two_servers_have_one_folder(tmp_path: Path) -> None:
    """The other one has what one stored, and goes on when the one that serves it is killed."""
    adapter = adapter_of(tmp_path / "kv", shared=True, object_bytes=NBYTES)
    known = range(PROMPTS)
    with serving(tmp_path, adapter) as server, serving(tmp_path, adapter) as other:
        store(server, known)

        def all_there() -> bool:
            return fetched(other, known) == PROMPTS * OBJECTS

        assert until(all_there, LIMIT)
        server.store(PROMPTS)
        server.end(signal.SIGKILL)
        assert until(all_there, LIMIT)
        store(other, range(PROMPTS, PROMPTS + 4))
        fetched(other, [PROMPTS])
        other.end()
        assert "Traceback" not in other.text


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the objects of prompts."""
    folder = tmp_path_factory.mktemp("stored")
    with serving(folder, adapter_of(folder / "kv")) as server:
        store(server, range(PROMPTS))
        server.end()
    return folder / "kv"


def flip(slots: Path) -> None:
    """Flip a bit in each second object."""
    image = PageSize(NBYTES).form("lmcache").image_bytes
    with slots.open("r+b") as file:
        for start in range(0, slots.stat().st_size, 2 * image):
            file.seek(start + image // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))


def swap(slots: Path) -> None:
    """Swap the bytes of the first objects with those of later ones."""
    image = PageSize(NBYTES).form("lmcache").image_bytes
    half = PROMPTS * OBJECTS // 2 * image
    data = slots.read_bytes()
    slots.write_bytes(data[half : 2 * half] + data[:half] + data[2 * half :])


def cut(slots: Path) -> None:
    """Cut half of the file off."""
    os.truncate(slots, slots.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, swap, cut])
def test_what_a_damaged_folder_has_is_right_or_missing(
    damage: Any, stored: Path, tmp_path: Path
) -> None:
    shutil.copytree(stored, tmp_path / "kv")
    (slots,) = (tmp_path / "kv").glob("*/slots")
    damage(slots)
    with serving(tmp_path, adapter_of(tmp_path / "kv")) as server:
        assert fetched(server, range(PROMPTS)) < PROMPTS * OBJECTS
        store(server, range(PROMPTS))
        assert fetched(server, range(PROMPTS)) == PROMPTS * OBJECTS


@pytest.mark.parametrize("damage", [flip, swap])
def test_control_of_damage(damage: Any, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "kv")
    (slots,) = (tmp_path / "kv").glob("*/slots")
    damage(slots)
    with serving(tmp_path, adapter_of(tmp_path / "kv"), before=UNGUARDED) as server:
        assert wrong(server, range(PROMPTS)) > PROMPTS // 2


def test_faults_of_a_disk_are_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault ends the server or lets a client wait; after it the server serves as before."""
    fault = tmp_path / "fault"
    set_fault(fault, "")
    monkeypatch.setenv(VARIABLE, str(fault))
    first = range(4)
    others = range(4, 8)
    with serving(tmp_path, adapter_of(tmp_path / "kv", deadline=1.0), before=FAULTY) as server:
        store(server, [*first, *others])
        set_fault(fault, "read hang")
        assert fetched(server, first) == 0
        set_fault(fault, "")
        store(server, first)

        set_fault(fault, "read EIO")
        assert fetched(server, first) == 0
        set_fault(fault, "")
        # A busy machine may take longer than the deadline.
        assert until(lambda: fetched(server, others) == len(others) * OBJECTS, LIMIT)
        store(server, first)

        set_fault(fault, "write ENOSPC")
        assert server.store(20)
        assert until(lambda: "failed for keys" in server.text, LIMIT)
        assert fetched(server, [20]) == 0
        set_fault(fault, "")
        store(server, [20])

        set_fault(fault, "write hang")
        assert server.store(21)
        assert until(lambda: fetched(server, first) == len(first) * OBJECTS, LIMIT)
        assert right(server.fetch(21), 21)
        set_fault(fault, "")
        store(server, [21])
        server.end()
        assert "Traceback" not in server.text


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"foler": "x"}, "got 'foler'. Did you mean folder?"),
        ({"staging": 1 << 10, "host": -1}, "Expected host"),
    ],
)
def test_a_wrong_term_is_named_at_the_start(
    terms: dict[str, Any], says: str, tmp_path: Path
) -> None:
    server = Server(tmp_path, adapter_of(tmp_path / "kv", **terms))
    assert server.process.wait(LIMIT) != 0
    assert says in server.text.strip().splitlines()[-1]
