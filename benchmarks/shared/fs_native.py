# SPDX-License-Identifier: Apache-2.0
"""Run LMCache's disk tier `fs_native`, bypassing the page cache.

The tier has 8 workers and two tasks in flight, as `lmcache bench l2` has. This is a program for a
Python with LMCache 0.5.6, which may lack PortaKV.

``fs_native.py FOLDER COUNT BYTES`` answers each line of ``clear``, ``store`` (new keys),
``replace`` (the old keys are deleted first, as a full tier must do) and ``load`` with
[seconds, CPU seconds, right].
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import count
from typing import Any


def main(folder: str, amount: int, nbytes: int) -> None:
    """Answer standard input line by line to its end."""
    answers = os.dup(1)
    os.dup2(2, 1)  # keeps LMCache's log out of the answers
    tier = Tier(folder, amount, nbytes)
    for line in sys.stdin:
        answer = tier.answer(line.strip())
        os.write(answers, (json.dumps(answer) + "\n").encode())
    tier.close()


class Tier:
    """LMCache's adapter, with memory for the objects that it stores and loads."""

    def __init__(self, folder: str, amount: int, nbytes: int) -> None:
        from lmcache.cli.commands.bench.l2_adapter_bench import data, runner
        from lmcache.v1.distributed.l2_adapters import config, create_l2_adapter

        settings = {
            "type": "fs_native",
            "base_path": folder,
            "use_odirect": True,
            "num_workers": 8,
        }
        args = argparse.Namespace(l2_adapter=[json.dumps(settings)])
        parsed = config.parse_args_to_l2_adapters_config(args).adapters[0]
        self._data = data
        self._runner = runner
        self._amount = amount
        self._half = amount * nbytes
        self._memory = data.make_aligned_tensor(2 * self._half, 4096)
        description = data.create_l1_memory_desc(self._memory, 4096)
        self._adapter = create_l2_adapter(parsed, l1_memory_desc=description)
        self._stored = data.make_memory_objects(self._memory, amount, nbytes, 0)
        self._loaded = data.make_memory_objects(self._memory, amount, nbytes, self._half)
        self._numbers = count()
        self._keys = list[Any]()

    def answer(self, word: str) -> tuple[float, float, bool]:
        """Carry out one word; return seconds, CPU seconds, and whether the result is right."""
        old = self._keys
        if word in ("store", "replace"):
            offset = next(self._numbers) * self._amount
            self._keys = self._data.make_object_keys(self._amount, key_offset=offset)
        elif word == "load":
            self._memory[self._half :] = 0xA5

        began = time.perf_counter()
        cpu = time.process_time()
        if word in ("clear", "replace"):
            self._adapter.delete(old)
        done = [] if word == "clear" else self._transfer(loads=word == "load")
        elapsed = time.perf_counter() - began
        used = time.process_time() - cpu
        return elapsed, used, self._is_right(word, done)

    def _transfer(self, loads: bool) -> list[Any]:
        """Store or load all objects in two tasks; return the results."""
        submit = self._adapter.submit_load_task if loads else self._adapter.submit_store_task
        wait = self._runner._wait_load_finished if loads else self._runner._wait_store_finished
        objects = self._loaded if loads else self._stored
        middle = self._amount // 2
        halves = (slice(0, middle), slice(middle, self._amount))
        tasks = [submit(self._keys[part], objects[part]) for part in halves]
        return [*wait(self._adapter, tasks, 120.0).values()]

    def _is_right(self, word: str, done: list[Any]) -> bool:
        import torch

        if word == "clear":
            return True
        if len(done) != 2:
            return False
        if word == "load":
            return torch.equal(self._memory[: self._half], self._memory[self._half :])
        return all(each.is_successful() for each in done)

    def close(self) -> None:
        """Close the adapter."""
        self._adapter.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
