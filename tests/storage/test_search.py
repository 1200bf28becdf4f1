# SPDX-License-Identifier: Apache-2.0
"""The search for other forms in a bucket, which ends in time whatever the bucket does."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from portakv.storage.form import BlockForm
from portakv.storage.tiers.remote import Remote

SMALL = BlockForm(
    "m", "float16", 2, (8, 8), 16, (0, 4, 4), (0, 2, 2), "block layer head kv token dim"
)


class SlowForms(Remote):
    """A folder in which forms are read one in each second of a clock, or not at all."""

    def __init__(self, folder: Path, silent: bool = False) -> None:
        super().__init__(f"file://{folder}")
        self.silent = silent
        self.seconds = 0.0
        self.now = lambda: self.seconds
        self.read = 0

    async def _read_small(self, path: str) -> bytes:
        self.read += 1
        if self.silent:
            self.seconds += self.search_seconds
            raise asyncio.TimeoutError  # another one than TimeoutError in Python 3.10
        self.seconds += 1.0
        return await super()._read_small(path)


def put_forms(folder: Path, count: int) -> None:
    """Have other stores put forms of one cache in a folder."""
    for number in range(count):
        form = replace(SMALL, heads=(number, number + 1, 8))
        path = folder / "1" / form.name / "form.json"
        path.parent.mkdir(parents=True)
        path.write_text(form.json())


def test_a_search_without_time_left_reads_no_form_and_fails_not(tmp_path: Path) -> None:
    """The next search reads the others; a search that came too soon forgets none."""
    put_forms(tmp_path, 8)
    remote = SlowForms(tmp_path)
    form = replace(SMALL, heads=(0, 8, 8))
    assert [len(remote.forms(form)) for _ in range(3)] == [3, 3, 3]
    assert remote.read == remote.search_seconds == 3
    assert (remote.left_alone, remote.last_error) == (False, "")
    remote.seconds += remote.search_seconds
    assert len(remote.forms(form)) == 6
    remote.seconds += remote.search_seconds
    assert len(remote.forms(form)) == 8
    assert remote.read == 8


def test_a_bucket_that_lists_and_reads_nothing_is_waited_for_once(tmp_path: Path) -> None:
    put_forms(tmp_path, 8)
    remote = SlowForms(tmp_path, silent=True)
    for _ in range(3):
        assert remote.forms(replace(SMALL, heads=(0, 8, 8))) == []
    assert remote.read == 1
    assert not remote.left_alone
    assert remote.last_error == "TimeoutError: no answer in 3.0 s"


def test_forms_are_found_in_a_thread_that_runs_an_event_loop(tmp_path: Path) -> None:
    put_forms(tmp_path, 2)
    remote = Remote(f"file://{tmp_path}")

    async def search() -> list[BlockForm]:
        return remote.forms(replace(SMALL, heads=(0, 8, 8)))

    with ThreadPoolExecutor(1) as pool:  # the main thread has a helper, without a loop
        assert len(pool.submit(asyncio.run, search()).result()) == 2
    assert remote.last_error == ""
