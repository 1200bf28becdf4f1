# SPDX-License-Identifier: Apache-2.0
"""A plain file of slots, moved by the engines of block stores and by fio: random slots, each once,
past the page cache."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portakv.storage.io.base import Engine, Request
from portakv_benchmarks.shared.shapes import POISON
from portakv_benchmarks.shared.trials import Method, Sample, Trials, timed

#: fio's methods, each at its best: the options besides the common ones.
FIO = {
    "fio io_uring": "--ioengine=io_uring --iodepth=64 --fixedbufs --registerfiles --size={nbytes}",
    "fio psync": "--ioengine=psync --numjobs=8 --thread --group_reporting --size={part} "
    "--offset_increment={part}",
}
THREADS = 8


class Slab:
    """A file of slots full of random words, and memory for as many bytes alongside these words."""

    def __init__(self, trials: Trials, folder: Path, slot: int, count: int) -> None:
        self.slot = slot
        self.nbytes = slot * count
        self.trials = trials
        self.path = folder / "slab"
        pages = mmap.mmap(-1, 2 * self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)  # as pinned memory has
        memory = np.frombuffer(pages, np.uint64)
        self.known = memory[: memory.size // 2]
        self.landed = memory[memory.size // 2 :]
        self.known[:] = np.random.default_rng(1).integers(0, 1 << 63, self.known.size, np.uint64)
        self.places = [(int(one.ctypes.data), self.nbytes) for one in (self.known, self.landed)]
        self.known.tofile(self.path)
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            trials.left_out.append(f"{folder} refuses O_DIRECT: the page cache is measured")
            self.fd = os.open(self.path, os.O_RDWR)
        os.fsync(self.fd)

    def method(self, engine: Engine, op: str, name: str = "", times: int = 1) -> Method:
        """Return a method that moves all slots by an engine ``times`` times, in random order."""
        write = op == "write"
        prepare = self._changed if write else lambda: self.landed.fill(POISON)
        return Method(
            name or engine.name,
            partial(self._run, engine, write, times),
            prepare,
            self._written if write else self._read,
        )

    def _run(self, engine: Engine, write: bool, times: int) -> Sample:
        base = self.places[0 if write else 1][0]
        order = [*range(0, self.nbytes, self.slot)]
        self.trials.random.shuffle(order)
        requests = [Request(self.fd, at, base + at, self.slot, write) for at in order]
        ended: set[int] = set()

        def run() -> None:
            for _ in range(times):
                ended.update(engine.run(requests))

        sample = timed(run)
        if wrong := ended - {self.slot}:
            raise RuntimeError(f"requests of {self.slot} bytes ended with {wrong}")
        return sample

    def _changed(self) -> None:
        np.bitwise_xor(self.known, np.uint64(0x5A5A_5A5A), out=self.known)

    def _written(self) -> bool:
        return np.array_equal(np.fromfile(self.path, np.uint64), self.known)

    def _read(self) -> bool:
        return np.array_equal(self.landed, self.known)

    def fio(self, program: str, name: str, op: str) -> Method:
        """Run the same requests by fio in a separate process; fio measures its time."""
        return Method(name, partial(self._fio, program, name, op), peer="fio")

    def _fio(self, program: str, name: str, op: str) -> Sample:
        own = FIO[name].format(nbytes=self.nbytes, part=self.nbytes // THREADS).split()
        words = [
            program,
            "--name=slab",
            f"--filename={self.path}",
            "--direct=1",
            f"--rw=rand{op}",
            f"--bs={self.slot}",
            "--output-format=json",
            *own,
        ]
        job = json.loads(message(words))["jobs"][0]
        if job["error"] or job[op]["io_bytes"] != self.nbytes:
            raise RuntimeError(f"fio moved {job[op]['io_bytes']} bytes of {self.nbytes}")
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        return Sample(self.nbytes / job[op]["bw_bytes"], cpu)

    def close(self) -> None:
        os.close(self.fd)
        self.path.unlink()


class FsNative:
    """Run LMCache in a separate process, over a folder next to the tier's."""

    def __init__(self, python: str, folder: Path, nbytes: int, amount: int) -> None:
        own = folder / "lmcache"
        own.mkdir()
        self.folder = own
        program = Path(__file__).with_name("fs_native.py")
        words = [python, str(program), str(own), str(amount), str(nbytes)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Its disk tier needs no device, and its kernels may not load alongside the torch that is
        # here.
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self.log = folder / "lmcache.log"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(words, **pipes, stderr=log, env=env)
        self.correct = True

    def ask(self, word: str) -> Sample:
        """Carry out ``clear``, ``store``, ``replace`` or ``load``."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(word, file=self.child.stdin, flush=True)
        answer = self.child.stdout.readline()
        if not answer:
            why = self.log.read_text(errors="replace").strip()[-200:]
            raise RuntimeError(f"LMCache's process ended with {self.child.wait()}: {why}")
        elapsed, cpu, self.correct = json.loads(answer)
        return Sample(elapsed, cpu)

    def method(self, word: str, prepare: Callable[[], object] = lambda: None) -> Method:
        """Return a word as a method."""
        return Method("lmcache", partial(self.ask, word), prepare, lambda: self.correct, "lmcache")

    def close(self) -> None:
        """End its process, and remove its files."""
        self.child.communicate(timeout=60)
        shutil.rmtree(self.folder)


def close(*opened: Any) -> None:
    """Close several things."""
    for each in opened:
        each.close()


def message(words: Sequence[str]) -> str:
    """Return the output of a command; raise with its error output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-200:]}")
    return done.stdout.strip()
