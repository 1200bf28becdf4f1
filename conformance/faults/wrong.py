# SPDX-License-Identifier: Apache-2.0
"""Two tiers that show what the fault table finds: one without any check, and one without faults.

`portakv conform --tier portakv_conformance.faults.wrong:Unchecked` shows wrong bytes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class Unchecked:
    """Blocks in slots of one file, written in place, with an index in another file; no checksums.

    Args:
        folder: for its files.
        model: ignored, as its index does not name it.
        nbytes: of a block.
    """

    def __init__(self, folder: str, model: str, nbytes: int) -> None:
        self._index_file = Path(folder) / "index.json"
        self._nbytes = nbytes
        self._fd = os.open(Path(folder) / "blocks", os.O_RDWR | os.O_CREAT, 0o600)
        self._index: dict[str, int] = {}
        if self._index_file.exists():
            self._index = json.loads(self._index_file.read_text())

    def put(self, key: bytes, memory: memoryview) -> bool:
        """Write a block in its place."""
        slot = self._index.setdefault(key.hex(), len(self._index))
        os.pwrite(self._fd, memory, slot * self._nbytes)
        self._index_file.write_text(json.dumps(self._index))
        return True

    def exists(self, key: bytes) -> bool:
        """Return whether the index has a block."""
        return key.hex() in self._index

    def get(self, key: bytes, memory: memoryview) -> bool:
        """Read a block, whatever comes."""
        slot = self._index.get(key.hex())
        if slot is None:
            return False
        os.preadv(self._fd, [memory], slot * self._nbytes)
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class InMemory:
    """Blocks in a dict: no file can be damaged, and a restart loses all."""

    def __init__(self, folder: str, model: str, nbytes: int) -> None:
        self._blocks: dict[bytes, bytes] = {}

    def put(self, key: bytes, memory: memoryview) -> bool:
        """Copy a block."""
        self._blocks[key] = bytes(memory)
        return True

    def exists(self, key: bytes) -> bool:
        """Return whether a block is there."""
        return key in self._blocks

    def get(self, key: bytes, memory: memoryview) -> bool:
        """Copy a block back."""
        block = self._blocks.get(key)
        if block is not None:
            memory[:] = block
        return block is not None

    def close(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
