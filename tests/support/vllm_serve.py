# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on a CPU with the connector, as an operator runs it.

    python -m support.vllm_serve FOLDER [--disk FOLDER]

answers prompts, fills the disk, removes the folder of the blocks, and stops the server in order;
then a store server is killed below a second `vllm serve`, and started again. It prints what both
have logged. ``--disk``: a small file system, such as a tmpfs of 64 MB; without one, the disk is not
filled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

from portakv.integrations import installed
from support.vllm_cpu import ENVIRONMENT, WORDS, make_model

LIMIT = 1800.0  # seconds that a server may take to start on a busy machine; only ends a hang
PAUSE = 0.2
TOKENS = 500  # of a prompt
BLOCK = 32  # of the engine
#: What a line of vLLM 0.32 begins with: the process, the level, the time and the file.
FORM = re.compile(r"^\(\w+ pid=\d+\) (DEBUG|INFO|WARNING|ERROR) \d\d-\d\d [\d:]+ \[[\w./]+:\d+\] ")


def write_metadata(folder: Path) -> None:
    """Write the metadata of a distribution ``vllm`` for a CPU, which `vllm serve` looks for, unless
    one is there. ``folder``: will be on the path of the server."""
    with suppress(PackageNotFoundError):
        if "cpu" in version("vllm"):
            return
    found = installed("vllm")
    assert found is not None
    release = f"{found[1].partition('+')[0]}+cpu"
    info = folder / f"vllm-{release}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose words are the numbers of tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1").save_pretrained(
        folder
    )


def free_port() -> int:
    """Return a port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A process whose log a test reads.

    Args:
        words: the command.
        log: a file for its output.
    """

    def __init__(self, words: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("a") as out:
            self.process: Any = subprocess.Popen(
                words, stdout=out, stderr=out, env={**os.environ, **environment}
            )

    def logged(self) -> str:
        """Return what the process has logged."""
        return self.log.read_text(errors="replace")

    def until(self, happened: Callable[[], object], what: str) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + LIMIT
        while not happened():
            assert self.process.poll() is None, f"it ended: {self.logged()[-4000:]}"
            assert time.monotonic() < end, f"not in time: {what}; {self.logged()[-4000:]}"
            time.sleep(PAUSE)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        self.process.send_signal(how)
        status: int = self.process.wait(LIMIT)
        return status

    def close(self) -> None:
        """Kill the process if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT)


class Serve(Running):
    """`vllm serve` of the small model.

    Args:
        folder: for the model and the log.
        terms: ``kv_connector_extra_config``.
        name: of the log.
    """

    def __init__(self, folder: Path, terms: Mapping[str, Any], name: str = "vllm") -> None:
        model = folder / "model"
        if not model.exists():
            make_model(model)
            write_tokenizer(model)
            write_metadata(folder / "site")
        self.model = str(model)
        self.port = free_port()
        transfer = {
            "kv_connector": "PortaKVConnector",
            "kv_connector_module_path": "portakv.integrations.vllm_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(terms),
        }
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model),
            *("--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32"),
            *("--enforce-eager", "--block-size", str(BLOCK), "--max-model-len", "2048"),
            *("--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "4"),
            *("--kv-transfer-config", json.dumps(transfer)),
        ]
        paths = [str(folder / "site"), *(path for path in sys.path if path)]
        own = {
            name: value
            for name, value in ENVIRONMENT.items()
            if name not in ("VLLM_CONFIGURE_LOGGING", "VLLM_ENABLE_V1_MULTIPROCESSING")
        }
        environment = {**own, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        super().__init__(command, folder / f"{name}.log", environment)

    @property
    def url(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait until the server answers."""

        def answers() -> bool:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
            except OSError:  # it does not listen yet
                return False
            return True

        self.until(answers, "an answer of the server")

    def ask(self, seed: int, tokens: int = 8) -> str:
        """Return the answer to a prompt."""
        draw = Random(seed)
        body = {
            "model": self.model,
            "prompt": [draw.randrange(10, WORDS) for _ in range(TOKENS)],
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
        return text

    def metrics(self) -> dict[str, float]:
        """Return the sums of PortaKV's counters over all labels, by their names."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=LIMIT) as answer:
            text = answer.read().decode()
        sums = dict[str, float]()
        for name, value in re.findall(
            r"^vllm:portakv_(\w+?)(?:\{.*\})? (\S+)$", text, re.MULTILINE
        ):
            if not name.endswith("_created"):
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def lines(self) -> list[str]:
        """Return the lines that PortaKV has logged: of its modules, and those without a form."""
        own = ("local.py", "rate_limited_log.py", "ranks.py", "[link.py", "[server.py", "portakv")
        return [line for line in self.logged().splitlines() if any(name in line for name in own)]


def serve_store(folder: Path, logs: Path) -> Running:
    """Start a store server of a folder."""
    command = [sys.executable, "-m", "portakv", "store", "serve", str(folder)]
    command += ["--capacity", "256MB", "--host", "0", "--staging", "64MB"]
    paths = os.pathsep.join(path for path in sys.path if path)
    return Running(command, logs / "store.log", {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"})


class Show:
    """Prints what each step has added to logs."""

    def __init__(self, *sides: Running) -> None:
        self._sides = list(sides)
        self._read = dict[Path, int]()

    def step(self, what: str, *more: Running) -> None:
        """Print a step, and the lines that came since the last one."""
        self._sides += more
        print(f"\n### {what}")
        for log in dict.fromkeys(side.log for side in self._sides):
            text = log.read_text(errors="replace")
            for line in text[self._read.get(log, 0) :].splitlines():
                if "/v1/completions" not in line and "/health" not in line:
                    print(f"{log.stem}: {line}")
            self._read[log] = len(text)
        sys.stdout.flush()


def disk_and_folder(folder: Path, disk: Path | None) -> None:
    """Fill the disk below an engine, remove its folder, and stop it in order."""
    place = (disk or folder) / "blocks"
    terms = {"folder": str(place), "capacity": 256 << 20, "host": 0, "staging": 32 << 20}
    serve = Serve(folder, terms)
    show = Show(serve)
    try:
        serve.wait()
        first = serve.ask(0)
        time.sleep(2)
        show.step("vllm serve has started, and has answered a prompt")
        if disk is not None:
            for seed in range(1, 60):
                serve.ask(seed, tokens=1)
            free = shutil.disk_usage(disk).free
            show.step(f"the disk is full: {free >> 20} MiB free; {serve.metrics()}")
        shutil.rmtree(place)
        for seed in range(100, 110):
            serve.ask(seed, tokens=1)
            time.sleep(1)
        show.step("the folder was removed, and ten prompts were answered")
        assert serve.ask(0) == first, "another answer to the first prompt"
        status = serve.stop()
        show.step(f"vllm serve was stopped in order: exit status {status}")
    finally:
        serve.close()


def store_server(folder: Path) -> None:
    """Kill the store server below an engine, start it again, and stop both in order."""
    place = folder / "shared"
    store = serve_store(place, folder)
    show = Show(store)
    store.until(lambda: place.exists() and store.logged(), "a store server")
    terms = {
        "folder": str(place),
        "capacity": 256 << 20,
        "host": 0,
        "staging": 64 << 20,
        "shared": "attach",
    }
    serve = Serve(folder, terms, "vllm with a store server")
    try:
        serve.wait()
        first = serve.ask(0)
        show.step("a store server and vllm serve have started", serve)
        store.stop(signal.SIGKILL)
        assert serve.ask(1)
        time.sleep(5)
        show.step("the store server was killed")
        store = serve_store(place, folder)
        time.sleep(20)
        assert serve.ask(2)
        show.step("the store server was started again", store)
        assert serve.ask(0) == first, "another answer to the first prompt"
        status = serve.stop()
        show.step(f"vllm serve was stopped in order: exit status {status}")
        status = store.stop()
        show.step(f"the store server was stopped in order: exit status {status}")
    finally:
        serve.close()
        store.close()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--disk", type=Path, help="a small file system, such as a tmpfs of 64 MB")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    disk_and_folder(args.folder, args.disk)
    store_server(args.folder)


if __name__ == "__main__":
    main()
