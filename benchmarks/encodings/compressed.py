# SPDX-License-Identifier: Apache-2.0
"""What zstd makes of raw and packed blocks on their way to an object store: bytes, and the time of
one thread.

    python -m portakv_benchmarks.encodings.compressed [--json FILE] [--turns 9]

It needs the extra `zstd`, and no device. Rows are normal numbers in bf16, drawn from a seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from portakv import KVView, copy_blocks
from portakv.storage import BlockForm
from portakv.storage.image import HEADER, Row, seal
from portakv.storage.tiers import remote

LAYERS = 4
HEADS = 8
SIZE = 64
DIM = 128
KEY = bytes(range(32))
NHD = "layer | kv block token head dim"


def images() -> dict[str, tuple[Row, BlockForm]]:
    """Return the sealed image of one block, raw and packed, with its form."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (2, 1, SIZE, HEADS, DIM)
    layers = [
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
        for _ in range(LAYERS)
    ]
    view = KVView(layers, NHD)
    made = {}
    for name, encoding in (("raw", None), ("packed", "pack")):
        form = BlockForm.of(view, "normal numbers", encoding=encoding)
        rows = torch.zeros((1, form.image_bytes), dtype=torch.uint8, device="cpu")
        copy_blocks(view, form.view(rows), [0], [0]).synchronize()
        row = rows[0].numpy()
        seal(row, form, KEY, 1)
        made[name] = row, form
    return made


def measured(turns: int) -> dict[str, dict[str, float]]:
    """Return the ratio and the rates of each kind of image, in bytes of the image and of raw
    rows."""
    codec = remote.zstd()
    made = images()
    raw_bytes = made["raw"][1].payload_bytes
    result = {}
    for name, (row, form) in made.items():
        data = remote.compress(row, form, codec)
        assert data is not None
        body = np.frombuffer(data, np.uint8)
        back = np.zeros_like(row)
        writing = _seconds(partial(remote.compress, row, form, codec), turns)
        reading = _seconds(partial(_read, body, back, form), turns)
        assert np.array_equal(back, row)
        result[name] = {
            "image_bytes": form.image_bytes,
            "object_bytes": len(data),
            "ratio": form.image_bytes / len(data),
            "ratio_to_raw": raw_bytes / len(data),
            "write_mb_s": form.payload_bytes / 1e6 / writing,
            "read_mb_s": form.payload_bytes / 1e6 / reading,
        }
    return result


def _read(body: Row, row: Row, form: BlockForm) -> None:
    """Restore an image from an object, as a tier does."""
    terms = remote.terms_of(body[:HEADER], form)
    assert terms is not None
    codec = remote.zstd()
    remote.restore_header(body[:HEADER], row, form)
    for number in range(len(form.segments)):
        part = body[slice(*terms.span(number))]
        assert remote.restore(part, row, form, terms, number, codec)


def _seconds(work: Callable[[], Any], turns: int) -> float:
    """Return the median processor time of this thread for a call."""
    times = []
    for _ in range(turns):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--turns", type=int, default=9)
    terms = parser.parse_args()
    result = measured(terms.turns)
    for name, figures in result.items():
        shown = ", ".join(f"{key} {value:,.3f}" for key, value in figures.items())
        print(f"{name}: {shown}")
    if terms.json:
        terms.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
