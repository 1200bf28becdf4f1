# SPDX-License-Identifier: Apache-2.0
"""LMCache's MP server in a process of its own, and a client of it that needs no device."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from support.waits import LIMIT, until

#: Tokens of an object of LMCache.
CHUNK = 16
#: Objects of a prompt.
OBJECTS = 4
SHAPE = (2, 4, CHUNK, 256)
#: Bytes of an object: 128 KiB.
NBYTES = 4 * 2 * 4 * CHUNK * 256
#: The host memory of a server: 64 objects, 16 prompts.
HOST_GB = 0.0078125
PATIENCE = LIMIT
READY = "cache server is running..."
RUN = "import runpy; runpy.run_module('lmcache.v1.multiprocess.server', run_name='__main__')"


def objects_of(prompt: int) -> list[torch.Tensor]:
    """Return the rows of a prompt, which all differ."""
    generator = torch.Generator().manual_seed(prompt)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float32) for _ in range(OBJECTS)]


class Server:
    """A server with L2 adapters, and the client's side of it.

    ``before``: code that its process runs first. ``chunk``: tokens of an object. ``host_gb``: its
    host memory.

    Attributes:
        log: the file with what the server prints.
    """

    def __init__(
        self,
        folder: Path,
        *adapters: dict[str, Any],
        before: str = "",
        chunk: int = CHUNK,
        host_gb: float = HOST_GB,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / f"server-{self.port}.log"
        command = [sys.executable, "-c", f"{before}\n{RUN}"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--disable-observability"]
        command += ["--chunk-size", str(chunk), "--l1-size-gb", str(host_gb)]
        command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven"]
        for adapter in adapters:
            command += ["--l2-adapter", json.dumps(adapter)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self._client: Any = None
        self._requests = 0

    @property
    def text(self) -> str:
        """Return what the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> None:
        """Wait until the server serves, and join it."""
        from lmcache.v1.multiprocess.custom_types import RegisterEngineDrivenContextPayload
        from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

        ready = until(lambda: READY in self.text or self.process.poll() is not None, PATIENCE)
        assert ready, self.text[-3000:]
        assert self.process.poll() is None, self.text[-3000:]
        self._client = RequestClientFactory.create(f"tcp://127.0.0.1:{self.port}")
        payload = RegisterEngineDrivenContextPayload(
            instance_id=1,
            model_name="model",
            world_size=1,
            block_size=CHUNK,
            num_layers=SHAPE[1],
            hidden_dim_size=SHAPE[3],
            dtype_str="float32",
            use_mla=False,
            num_physical_slots=CHUNK,
        )
        self._call("register_kv_cache_engine_driven_context", payload)

    def store(self, prompt: int, salt: str = "") -> bool:
        """Store the rows of a prompt; return False if the server's host memory is full."""
        key = self._key(prompt, OBJECTS, salt)
        self._call("prepare_store", key, 1)
        stored = bool(self._call("commit_store", key, 1, pickle.dumps(objects_of(prompt))))
        self._call("end_session", key.request_id)
        return stored

    def fetch(self, prompt: int, salt: str = "") -> list[torch.Tensor]:
        """Return the rows that the server has of a prompt, from its beginning."""
        key = self._key(prompt, OBJECTS, salt)
        lookup = key.no_worker_id_version()
        self._call("lookup", lookup, 1)
        answers = list[int]()

        def answered() -> bool:
            answer = self._call("query_prefetch_status", lookup.request_id)
            answers.extend([] if answer is None else [answer])
            return bool(answers)

        assert until(answered, PATIENCE), f"The lookup hangs.\n{self.text[-3000:]}"
        rows = list[torch.Tensor]()
        if answers[0]:
            held = self._key(prompt, answers[0], salt, key.request_id)
            response = self._call("prepare_retrieve", held, 1)
            rows = pickle.loads(response.data) if response.success else []
            self._call("commit_retrieve", held, 1)
        self._call("end_session", key.request_id)
        return rows

    def clear(self) -> None:
        """Empty the server's host memory, except for objects that are in use."""
        self._call("clear")

    def fetch_from_l2(self, prompt: int, salt: str = "") -> list[torch.Tensor]:
        """Return the rows of a prompt that L2 has, and the host memory has not."""
        self.clear()
        return self.fetch(prompt, salt)

    def end(self, how: int = signal.SIGTERM) -> None:
        """End the server, and leave it."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.process.send_signal(how)
        self.process.wait(PATIENCE)

    def _key(self, prompt: int, objects: int, salt: str, request: str = "") -> Any:
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        self._requests += 1
        tokens = [1000 * prompt + number for number in range(OBJECTS * CHUNK)]
        return IPCCacheServerKey.from_token_ids(
            "model",
            1,
            0,
            tokens,
            start=0,
            end=objects * CHUNK,
            request_id=request or f"request {self._requests}",
            cache_salt=salt,
        )

    def _call(self, name: str, *terms: Any) -> Any:
        return getattr(self._client, name)(*terms).result(timeout=PATIENCE)


@contextmanager
def serving(folder: Path, *adapters: dict[str, Any], before: str = "") -> Iterator[Server]:
    """Make a server, wait until it serves, and end it.

    ``before``: code that its process runs first.
    """
    server = Server(folder, *adapters, before=before)
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def right(rows: Sequence[torch.Tensor], prompt: int) -> bool:
    """Return whether rows are those of a prompt, from its beginning."""
    return all(torch.equal(a, b) for a, b in zip(rows, objects_of(prompt), strict=False))
