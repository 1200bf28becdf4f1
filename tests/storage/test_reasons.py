# SPDX-License-Identifier: Apache-2.0
"""The error of a load or a save says why blocks did not land: each reason with its count, and with
the path or address of the tier."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from support import ready
from support.core_cases import noise
from support.storage_cases import FakeTier, key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import TransferError
from portakv.runtime import resources
from portakv.storage import BlockStore, Disk, Remote
from portakv.storage.io.base import Ended, Engine, Request
from portakv.storage.tiers.disk import DiskStore
from portakv.storage.tiers.folder import file_system_of

KEYS = [key_of(i) for i in range(8)]
FORM = small_form()


def cache(seed: int = 0) -> KVView:
    """Return a paged cache of noise that the small form fits."""
    tensors = [noise(12, 2, 4, 2, 32, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView(tensors, "layer | block kv token head dim")


def opened(*tiers: Any, staging: int = 8, **terms: Any) -> BlockStore:
    terms = {"full": "wait", **terms}
    return BlockStore(FORM, staging=staging * FORM.image_bytes, tiers=tiers, **terms)


def saved(store: BlockStore) -> None:
    store.save(cache(), range(8), KEYS, priority="urgent").synchronize(LIMIT)


def error_of_load(store: BlockStore, **terms: Any) -> str:
    """Return the sentence of a load of all blocks."""
    with pytest.raises(TransferError) as error:
        store.load(cache(), range(8), KEYS, **terms).synchronize(LIMIT)
    store.load(cache(), range(8), KEYS, missing="skip").synchronize(LIMIT)
    return str(error.value)


def break_object(remote: Remote, key: bytes) -> None:
    path = f"1/{FORM.name}/{key.hex()[:2]}/{key.hex()}"
    body = bytearray(remote.obs.get(remote.store, path).bytes())
    body[5000] ^= 1
    remote.obs.put(remote.store, path, bytes(body))


def store_of(store: BlockStore) -> DiskStore:
    tier_store = store._tier_stores[0]
    assert isinstance(tier_store, DiskStore)
    return tier_store


def break_slot(store: BlockStore, key: bytes) -> None:
    slots, *_ = store_of(store).parts
    at = slots.index[key] * FORM.image_bytes + 5000
    fd = os.open(slots.folder / "slots", os.O_RDWR)
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ 1]), at)
    os.close(fd)


class Failing:
    """An engine of a disk tier all of whose requests end with an error."""

    name = "failing"
    notes: tuple[str, ...] = ()

    def __init__(self, engine: Engine, code: int) -> None:
        self.engine = engine
        self.code = code

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        for number, _ in enumerate(requests):
            if ended:
                ended(number, -self.code)
        return [-self.code for _ in requests]

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield an address where something listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def impatient(url: str, endpoint: str) -> Remote:
    """Return a remote tier at an endpoint, which gives up soon."""
    retry = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    options = {"allow_http": True, "read_timeout": "200ms"}
    names: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b", "region": "r"}
    return Remote(url, endpoint=endpoint, retry_config=retry, client_options=options, **names)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_damaged_object_is_named(by_layer: bool) -> None:
    remote = Remote("memory://")
    with opened(remote) as store:
        saved(store)
        break_object(remote, KEYS[3])
        break_object(remote, KEYS[5])
        text = error_of_load(store, by_layer=by_layer)
    assert text.startswith("6 of 8 blocks landed. 2 damaged (memory://: ")
    assert text.endswith("Begin the load with missing='skip' to accept that.")


def test_a_damaged_slot_is_named_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        saved(store)
        break_slot(store, KEYS[3])
        text = error_of_load(store)
    assert text == (
        f"7 of 8 blocks landed. 1 damaged ({tmp_path}). "
        f"Begin the load with missing='skip' to accept that."
    )
    (line,) = [x for x in caplog.messages if "damaged" in x]
    assert KEYS[3].hex() in line
    assert f"in {tmp_path}/{FORM.name} " in line


def test_a_device_that_fails_is_named(tmp_path: Path) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        saved(store)
        tier_store = store_of(store)
        engine = tier_store.engine

        tier_store.engine = Failing(engine, errno.EAGAIN)
        text = error_of_load(store)
    again = os.strerror(errno.EAGAIN)
    assert text.startswith(f"0 of 8 blocks landed. 8 unreachable ({tmp_path}: {again}). ")


def test_a_block_that_goes_between_the_plan_and_the_read_is_evicted(tmp_path: Path) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        saved(store)
        tier_store: Any = store_of(store)
        read = tier_store.read
        slots, *_ = tier_store.parts

        def evict_first(*arguments: Any) -> list[bool]:
            (place,) = slots.pin([KEYS[2]])
            if place:
                slots.unpin(place, good=False)
            landed: list[bool] = read(*arguments)
            return landed

        tier_store.read = evict_first
        text = error_of_load(store)
    assert text.startswith(f"7 of 8 blocks landed. 1 evicted ({tmp_path}). ")


def test_an_object_that_a_lookup_found_and_that_is_gone_is_evicted() -> None:
    remote = Remote("memory://")
    with opened(remote) as store:
        saved(store)
        assert store.lookup(KEYS) == 8
        key = KEYS[4].hex()
        remote.obs.delete(remote.store, [f"1/{FORM.name}/{key[:2]}/{key}"])
        text = error_of_load(store)
    assert text.startswith("7 of 8 blocks landed. 1 evicted (memory://). ")


def test_a_server_that_is_down_or_refuses_is_named(silent: str) -> None:
    """Neither is the same as a block that is damaged, or that no tier has."""
    with opened(impatient("s3://bucket/p", silent)) as store:
        text = error_of_load(store)
        assert text.startswith("0 of 8 blocks landed. ")
        assert "unreachable (s3://bucket/p: " in text
        assert "missing (" not in text

        handle = store.save(cache(), range(8), KEYS, priority="urgent")
        with pytest.raises(TransferError) as error:
            handle.synchronize(LIMIT)
        text = str(error.value)
        assert text.startswith("0 of 8 blocks landed. ")
        assert "unreachable (s3://bucket/p: " in text
        assert "skip" not in text


def test_a_block_that_no_tier_has_is_missing(tmp_path: Path) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        text = error_of_load(store)
    assert text == (
        "0 of 8 blocks landed. 8 missing (no tier has it). "
        "Begin the load with missing='skip' to accept that."
    )


def test_reasons_of_several_tiers_have_their_counts(tmp_path: Path) -> None:
    """A block that the next tier brings has no reason; that a tier lacks one explains nothing."""
    remote = Remote("memory://")
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads"), remote) as store:
        saved(store)
        for key in KEYS[:4]:
            break_slot(store, key)
        break_object(remote, KEYS[0])
        text = error_of_load(store)
    assert text.startswith("7 of 8 blocks landed. ")
    assert f"1 damaged ({tmp_path})" in text
    assert "1 damaged (memory://: " in text


def test_calls_that_join_a_read_have_its_reasons() -> None:
    remote = Remote("memory://")
    with opened(remote) as store:
        saved(store)
        break_object(remote, KEYS[3])
        begun = Event()
        go = Event()
        tier_store: Any = store._tier_stores[0]
        read = tier_store.read

        def blocked(*arguments: Any) -> list[bool]:
            begun.set()
            assert go.wait(LIMIT)
            landed: list[bool] = read(*arguments)
            return landed

        tier_store.read = blocked
        handles = [store.load(cache(), range(8), KEYS) for _ in range(2)]
        assert begun.wait(LIMIT)
        go.set()
        for handle in handles:
            with pytest.raises(TransferError, match=r"^7 of 8 .* 1 damaged \(memory://: "):
                handle.synchronize(LIMIT)


def test_a_save_on_a_full_device_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        tier_store = store_of(store)
        engine = tier_store.engine

        tier_store.engine = Failing(engine, errno.ENOSPC)
        handle = store.save(cache(), range(8), KEYS, priority="urgent")
        with pytest.raises(TransferError) as error:
            handle.synchronize(LIMIT)
    assert str(error.value) == (
        f"0 of 8 blocks landed. 8 unreachable ({tmp_path}: {os.strerror(errno.ENOSPC)})."
    )
    assert KEYS[0].hex() in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
def test_a_save_without_space_for_a_slot_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """Its error, `explain` and one line of the log name the file system and the error."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(resources, "fallocate", refuse)
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        text = error_of(store.save(cache(), range(8), KEYS, priority="urgent"))
        slots, *_ = store_of(store).parts
        shortage = slots.health.shortage
        assert shortage is not None
        assert shortage.errno == number
        assert text == f"0 of 8 blocks landed. 8 dropped ({shortage.why})."
        assert file_system_of(tmp_path) in shortage.why
        assert caplog.messages == [shortage.sentence]
        explained = store.explain()
        # Other processes may have freed space, so that the folder tried again.
        assert slots.health.shortage is not None
        assert slots.health.shortage.sentence in explained
        monkeypatch.undo()
        saved(store)
        assert file_system_of(tmp_path) not in store.explain()


def test_a_save_into_a_folder_that_was_removed_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a deletion of all that the tier has; what is stored can be loaded until the end."""
    with opened(Disk(tmp_path / "kv", capacity=1 << 20, io="threads")) as store:
        handle = store.save(cache(), range(4), KEYS[:4], priority="urgent")
        handle.synchronize(LIMIT)
        shutil.rmtree(tmp_path / "kv")
        text = error_of(store.save(cache(), range(4, 8), KEYS[4:], priority="urgent"))
        slots, *_ = store_of(store).parts
        assert text == f"0 of 4 blocks landed. 4 unreachable ({slots.health.lost})."
        assert len(caplog.messages) == 1
        assert slots.health.lost in caplog.text
        assert slots.health.lost in store.explain()
        assert store.lookup(KEYS) == 4
        store.load(cache(), range(4), KEYS[:4]).synchronize(LIMIT)
    assert not (tmp_path / "kv").exists()


def test_a_save_whose_records_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        saved(store)
        other = [key_of(i) for i in range(10, 14)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            text = error_of(store.save(cache(), range(4), other, priority="urgent"))
        place = tmp_path / FORM.name / "table"
        why = f"{place} cannot be written: it lies on a read-only file system"
        assert text == f"0 of 4 blocks landed. 4 unreachable ({why})."
        assert caplog.messages == [why]


def test_a_save_that_staging_drops_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """And its error says it."""
    tier = FakeTier()
    tier.hold = Event()
    with opened(tier, staging=2, full="drop") as store:
        first = store.save(cache(), [0], KEYS[:1], priority="urgent")
        second = store.save(cache(), [1], KEYS[1:2], priority="urgent")
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(TransferError, match="staging was full"),
        ):
            second.synchronize(LIMIT)
        tier.hold.set()
        first.synchronize(LIMIT)
    (line,) = [x for x in caplog.messages if "dropped" in x]
    assert KEYS[1].hex() in line


def error_of(handle: Any) -> str:
    """Return the sentence with which a handle ends."""
    with pytest.raises(TransferError) as error:
        handle.synchronize(LIMIT)
    return str(error.value)


def test_a_save_counts_blocks_that_are_gone_when_it_ends(tmp_path: Path) -> None:
    """It found the last ones stored, and evicted them for the first ones."""
    with opened(Disk(tmp_path, capacity=6 * FORM.image_bytes, io="threads")) as store:
        store.save(cache(), range(5, 8), KEYS[5:], after=KEYS[4]).synchronize(LIMIT)
        text = error_of(store.save(cache(), range(8), KEYS))
    assert text == f"6 of 8 blocks landed. 2 evicted ({tmp_path})."


def test_a_save_to_the_host_tier_counts_blocks_that_are_gone_when_it_ends() -> None:
    with opened(host=4 * FORM.image_bytes) as store:
        handle = store.save(cache(), range(8), KEYS, priority="urgent")
        text = error_of(handle)
    landed = int(handle.landed.sum())
    assert text == f"{landed} of 8 blocks landed. {8 - landed} evicted (the host tier)."


@pytest.mark.parametrize("end", ["late", "cancelled"])
@pytest.mark.parametrize("call", ["save", "load", "joined load"])
def test_blocks_whose_transfer_never_began_are_counted(call: str, end: str) -> None:
    """One block holds the only worker; the others wait for it."""
    tier = FakeTier(width=1)
    with opened(tier) as store:
        saved(store)
        go = tier.hold = Event()
        tier.began.clear()
        tier.faults = {KEYS[0]: [lambda: go.wait(LIMIT)]}
        others = [key_of(100 + number) for number in range(8)]
        terms: dict[str, Any] = {"deadline": 0.05} if end == "late" else {}
        if call == "save":
            first = store.save(cache(), [0], others[:1], priority="urgent")
            assert tier.began.wait(LIMIT), "the first one has the worker"
            second = store.save(cache(), range(1, 4), others[1:4], priority="urgent", **terms)
        else:
            first = store.load(cache(), [0], KEYS[:1])
            second = store.load(cache(), range(1, 4), KEYS[1:4], **terms)
        if call == "joined load":
            third = store.load(cache(), range(1, 4), KEYS[1:4], **terms)
            second.cancel()
            second = third
        if end == "cancelled":
            second.cancel()
        text = error_of(second)
        go.set()
        first.synchronize(LIMIT)
    # If the copy from the device had not begun either, it is counted as well.
    assert text.startswith("0 of 3 blocks landed. ")
    assert f"3 {end} (fake:x)" in text


def test_blocks_that_staging_drops_are_counted() -> None:
    tier = FakeTier()
    tier.hold = Event()
    with opened(tier, staging=2, full="drop") as store:
        first = store.save(cache(), [0], KEYS[:1], priority="urgent")
        text = error_of(store.save(cache(), [1], KEYS[1:2], priority="urgent"))
        tier.hold.set()
        first.synchronize(LIMIT)
    assert text.startswith("0 of 1 blocks landed. 1 dropped (device-host). ")


def test_blocks_whose_tier_raises_are_counted() -> None:
    with opened(FakeTier()) as store:
        tier_store: Any = store._tier_stores[0]
        tier_store.write = lambda *_, **__: 1 // 0
        text = error_of(store.save(cache(), range(4), KEYS[:4]))
    assert text.startswith("0 of 4 blocks landed. 4 failed (fake:x). ZeroDivisionError(")


def test_a_save_without_a_free_descriptor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder cannot be listed for its size; the tier reports that, and raises nothing."""

    def refused(folder: object) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", refused)
            text = error_of(store.save(cache(), [0], KEYS[:1]))
        store.save(cache(), [0], KEYS[:1]).synchronize(LIMIT)
        assert store.lookup(KEYS[:1]) == 1
    where = f"({tmp_path}: Too many open files)"
    assert text.startswith(f"0 of 1 blocks landed. 1 unreachable {where}")


def test_a_save_of_no_blocks_ends(tmp_path: Path) -> None:
    with opened(Disk(tmp_path, capacity=1 << 20, io="threads")) as store:
        handle = store.save(cache(), [], [])
        handle.synchronize(LIMIT)
        assert handle.landed.tolist() == []
        store.load(cache(), [], []).synchronize(LIMIT)


def test_a_bucket_without_descriptors_is_not_reached(tmp_path: Path) -> None:
    """No traceback is printed; the blocks come when some are free."""
    text = """if True:
        import sys, torch
        from portakv import KVView
        from portakv.storage import BlockForm, BlockStore
        from portakv.storage.tiers.remote import Remote
        from support import no_descriptors
        view = KVView([torch.ones(8, 2, 4, 2, 8)], "layer | block kv token head dim")
        form = BlockForm.of(view, "m")
        store = BlockStore(form, staging=1 << 20, tiers=[Remote("file://" + sys.argv[1])])
        keys = [bytes([n]) * 32 for n in range(3)]
        store.save(view, [0, 1, 2], keys).synchronize(60)
        handle = store.load(view, [3, 4, 5], keys)
        handle.synchronize(60)
        no_descriptors.limit()
        with no_descriptors.left(0):
            handle = store.load(view, [3, 4, 5], keys, missing="skip")
            handle.synchronize(60)
            print(handle.landed.tolist())
        handle = store.load(view, [3, 4, 5], keys)
        handle.synchronize(60)
        print(handle.landed.tolist())
        store.close()
    """
    ran = ready.run("-c", text, tmp_path, timeout=120)
    assert (ran.returncode, ran.stderr.count("Traceback")) == (0, 0)
    assert ran.stdout.splitlines() == ["[False, False, False]", "[True, True, True]"]
