# SPDX-License-Identifier: Apache-2.0
"""LMCache's disk tier `fs_native`, past the page cache, with 8 workers and two tasks in flight as
its own `lmcache bench l2` has: a program for a Python with LMCache 0.5.6, which may lack PortaKV.

``fs_native.py FOLDER COUNT BYTES`` answers each line of ``clear``, ``store`` (new keys),
``replace`` (the old ones deleted first, as a full tier must) and ``load`` with
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
    """Answer line by line until there is no other."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what LMCache logs is no answer
    import torch
    from lmcache.cli.commands.bench.l2_adapter_bench import data, runner
    from lmcache.v1.distributed.l2_adapters import config, create_l2_adapter

    given = {"type": "fs_native", "base_path": folder, "use_odirect": True, "num_workers": 8}
    asked = argparse.Namespace(l2_adapter=[json.dumps(given)])
    parsed = config.parse_args_to_l2_adapters_config(asked).adapters[0]
    memory = data.make_aligned_tensor(2 * amount * nbytes, 4096)
    half = amount * nbytes
    adapter = create_l2_adapter(parsed, l1_memory_desc=data.create_l1_memory_desc(memory, 4096))
    stored = data.make_memory_objects(memory, amount, nbytes, 0)
    loaded = data.make_memory_objects(memory, amount, nbytes, half)
    halves = (slice(0, amount // 2), slice(amount // 2, amount))
    numbers = count()
    keys = list[Any]()
    done = list[Any]()

    for line in sys.stdin:
        word = line.strip()
        old = keys
        task = adapter.submit_load_task
        if word in ("store", "replace"):
            task = adapter.submit_store_task
            keys = data.make_object_keys(amount, key_offset=next(numbers) * amount)
        elif word == "load":
            memory[half:] = 0xA5
        began = time.perf_counter()
        cpu = time.process_time()
        if word in ("clear", "replace"):
            adapter.delete(old)
        if word == "clear":
            done = [None] * len(halves)
        else:
            objects = loaded if word == "load" else stored
            tasks = [task(keys[part], objects[part]) for part in halves]
            wait = runner._wait_load_finished if word == "load" else runner._wait_store_finished
            done = [*wait(adapter, tasks, 120.0).values()]
        spent = time.perf_counter() - began, time.process_time() - cpu
        right = len(done) == len(halves)
        if word == "load":
            right = right and torch.equal(memory[:half], memory[half:])
        elif word != "clear":
            right = right and all(each.is_successful() for each in done)
        os.write(answers, (json.dumps([*spent, right]) + "\n").encode())
    adapter.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
