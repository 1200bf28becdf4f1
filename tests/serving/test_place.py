# SPDX-License-Identifier: Apache-2.0
"""Where processes find a server, and who may serve."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.no_descriptors import limited
from support.pool_processes import Child

from portakv.errors import HostMemoryError, InvalidTerms, StoreError
from portakv.host.shared import process_space, started
from portakv.serving import Place, StoreTerms, place_of
from portakv.serving.server.server import check_process, has_ended

ADDRESS = "ipc:///proc/12/fd/34"


def test_one_serves_and_the_others_find_it(tmp_path: Path) -> None:
    first = Place.of_folder(tmp_path / "store")
    second = Place.of_folder(tmp_path / "store")
    assert first.address() == ""
    assert first.claim()
    assert first.claim()
    assert not second.claim()
    first.publish(ADDRESS)
    assert second.address() == ADDRESS
    first.release()
    assert not first.claimed
    assert second.address() == ""
    assert second.claim()
    second.release()


def test_the_next_one_serves_when_a_process_is_killed(tmp_path: Path) -> None:
    place = Place.of_folder(tmp_path)

    def serve(pipe: Connection) -> None:
        own = Place.of_folder(tmp_path)
        pipe.send(own.claim())
        own.publish(ADDRESS)
        pipe.send("published")
        pipe.recv()

    child = Child(serve)
    assert child.receive() is True
    assert child.receive() == "published"
    assert not place.claim()
    assert place.address() == ADDRESS
    child.kill()
    assert place.claim()
    assert place.address() == ""  # the address of the other one is gone
    place.release()


def test_a_process_that_cannot_write_its_address_does_not_serve(tmp_path: Path) -> None:
    """Nobody would find it. It serves later, or another one does."""

    def serve(pipe: Connection) -> None:
        own = Place.of_folder(tmp_path)
        pipe.send(own.claim())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a device without space
        try:
            own.publish(ADDRESS)
        except StoreError as error:
            pipe.send(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        pipe.send(own.claimed)
        pipe.recv()
        pipe.send(own.claim())
        own.publish(ADDRESS)
        pipe.send("published")
        pipe.recv()

    child = Child(serve)
    assert child.receive() is True
    assert "keeper" in child.receive()
    assert child.receive() is False
    place = Place.of_folder(tmp_path)
    assert place.claim()
    place.release()
    child.here.send("go on")
    assert child.receive() is True
    assert child.receive() == "published"
    assert place.address() == ADDRESS
    child.kill()


def test_a_forked_process_does_not_serve(tmp_path: Path) -> None:
    """It does not keep the folder when its parent has ended, either."""
    place = Place.of_folder(tmp_path)
    assert place.claim()

    def say(pipe: Connection) -> None:
        pipe.send(place.claimed)
        pipe.recv()

    child = Child(say)
    assert child.receive() is False
    place.drop()  # as the end of the parent does
    assert place.claim()
    child.end()
    place.release()


def test_places_that_others_may_write_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StoreError, match="which others may write"):
        Place.of_folder(folder).claim()
    folder.chmod(0o755)
    (folder / "keeper").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="got a symbolic link"):
        Place.of_folder(folder).claim()
    with pytest.raises(StoreError, match="symbolic link"):
        Place.of_folder(folder).address()


@pytest.mark.parametrize(
    "text", ["", "ipc:///tmp/other\n", "tcp://1.2.3.4:5\n", ADDRESS, "\0" * 99]
)
def test_other_texts_are_no_addresses(tmp_path: Path, text: str) -> None:
    """Also an address without its end, which was being written."""
    (tmp_path / "keeper").write_text(text)
    assert Place.of_folder(tmp_path).address() == ""


def test_an_engine_without_a_folder_has_a_private_place() -> None:
    engine = f"engine {os.getpid()}"
    place = Place.of_engine(engine)
    assert place.claim()
    folder = Path(place.name)
    try:
        assert folder.stat().st_mode & 0o077 == 0
        place.publish(ADDRESS)
        assert Place.of_engine(engine).address() == ADDRESS
        assert Place.of_engine("another").address() == ""
    finally:
        place.release()
    assert Place.of_engine(engine).address() == ""
    assert not (folder / sha256(engine.encode()).hexdigest()[:32]).exists()


def test_terms_say_where_a_store_server_is_found(tmp_path: Path) -> None:
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert place_of(StoreTerms(folder=folders), "").name == folders[0]
    assert place_of(StoreTerms(), "an engine").name == Place.of_engine("an engine").name
    with pytest.raises(InvalidTerms, match="engine"):
        place_of(StoreTerms(), "")


def test_a_process_that_cannot_be_looked_at_has_not_ended() -> None:
    """Its rows would be lent to another process while it writes them."""
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as child:
        process = process_space(), child.pid, started(child.pid) or 0
        with limited():
            assert not has_ended(process)
            with pytest.raises(HostMemoryError, match="too many open files"):
                check_process(process)
        assert not has_ended(process)
        child.kill()
        child.wait()
        with limited():
            assert not has_ended(process)
        assert has_ended(process)


def test_an_address_that_cannot_be_read_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine would else look as if no other process served."""
    place = Place.of_folder(tmp_path)
    assert place.address() == ""
    assert place.claim()
    place.publish(ADDRESS)
    with limited():
        assert place.address() == ""
    (text,) = caplog.messages
    assert f"{tmp_path / 'keeper'} cannot be read: Too many open files" in text
    assert place.address() == ADDRESS
    place.release()
