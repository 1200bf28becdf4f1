# SPDX-License-Identifier: Apache-2.0
"""Forms: equal where readings are equal, the same in another process, aligned as the addresses."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.core_cases import noise
from support.presets_cases import KINDS, side

from portakv import KVView


@pytest.mark.parametrize("name", KINDS)
def test_a_copied_form_is_the_same_form(name: str) -> None:
    form = KVView(side(name).tensors, name, **side(name).extents).form
    for again in (copy.copy(form), copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
        assert again == form
        assert hash(again) == hash(form)


@pytest.mark.full
def test_a_form_sent_to_another_process_is_found_there() -> None:
    """The hash of a string differs between processes: it must not travel along."""
    program = (
        "import pickle, sys, torch\nfrom portakv import KVView\n"
        "local = KVView(torch.zeros(2, 3, 4, 8), 'kv block token dim').form\n"
        "print(local in {pickle.load(sys.stdin.buffer)})\n"
    )
    form = KVView(torch.zeros(2, 3, 4, 8), "kv block token dim").form
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(form),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    assert done.stdout.split() == [b"True"]


@pytest.mark.parametrize(
    ("begins", "alignment"),
    [*(((at,), at & -at or 16) for at in (0, 16, 8, 4, 2, 1, 3, 24)), ((0, 64, 128 + 4), 4)],
)
def test_alignment_is_the_least_of_all_addresses(begins: tuple[int, ...], alignment: int) -> None:
    memory = noise(256, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    layers = [memory[at : at + 64].view(4, 16) for at in begins]
    assert KVView(layers, "layer | token dim").form.alignment == alignment


def test_a_storage_that_begins_off_the_alignment_counts_as_well() -> None:
    """Torch addresses elements from the storage's base."""
    numbers = np.zeros(256, dtype=np.uint8)
    start = -numbers.ctypes.data % 16
    odd = torch.from_numpy(numbers[start + 1 :])
    view = KVView(odd[15 : 15 + 64].view(4, 16), "token dim")
    assert view.addresses[0] % 16 == 0
    assert view.form.alignment == 1


#: The interpreter changes threads while each of them looks whether there is a reader.
FIRST_VIEWS = """
import threading
import torch
from portakv import KVView

tensors = [torch.zeros(6, 2, 64, dtype=torch.uint8) for _ in range(4)]
together = threading.Barrier(4)

def look(tensor):
    together.wait()
    for _ in range(50):
        KVView(tensor, "block token dim")

threads = [threading.Thread(target=look, args=(each,)) for each in tensors]
for each in threads:
    each.start()
for each in threads:
    each.join()
"""


def test_several_threads_make_the_first_views_of_a_process() -> None:
    """The first reader of each of them is used; one that was freed ended the process."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_VIEWS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
