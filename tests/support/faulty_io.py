# SPDX-License-Identifier: Apache-2.0
"""An I/O engine whose faults a test changes while another process uses it.

``PORTAKV_IO=support.faulty_io:Faulty`` chooses it, and ``FAULTY_IO`` names a file. The text of the
file is the fault of each request from then on: "read EIO", "write ENOSPC", "read hang", "write
hang", or nothing. "read nothing" and "write nothing" move no byte, and report that all have moved:
a negative control.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from portakv.storage.io.base import Ended, Request
from portakv.storage.io.choose import Threads

VARIABLE = "FAULTY_IO"
PAUSE = 0.01


def set_fault(file: Path, text: str) -> None:
    """Set the fault of requests from now on, in one step; an empty text: none."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="ascii")
    new.replace(file)


class Faulty(Threads):
    """The engine `threads` with the faults of a file."""

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        while True:
            kind, what = self._fault()
            hit = [kind == ("write" if request.write else "read") for request in requests]
            if what != "hang" or not any(hit):
                break
            time.sleep(PAUSE)
        left = [number for number, fails in enumerate(hit) if not fails]
        results = [0] * len(requests)

        def note(number: int, result: int) -> None:
            if ended is not None:
                ended(left[number], result)

        for number, fails in enumerate(hit):
            if fails:
                all_moved = requests[number].nbytes
                results[number] = all_moved if what == "nothing" else -getattr(errno, what)
                if ended is not None:
                    ended(number, results[number])
        moved = super().run([requests[number] for number in left], note)
        for number, result in zip(left, moved, strict=True):
            results[number] = result
        return results

    @staticmethod
    def _fault() -> tuple[str, str]:
        kind, _, what = Path(os.environ[VARIABLE]).read_text(encoding="ascii").partition(" ")
        return kind, what
