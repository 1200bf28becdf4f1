# SPDX-License-Identifier: Apache-2.0
"""A process that runs code for tests, kept alive for several of them: its begin takes seconds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

from support import ready


class Refused(Exception):
    """An error that the code raised there: the type's name and the sentence."""


class Peer:
    """A separate process; a context manager, which ends it."""

    def __init__(self, **environment: str) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = ready.Python(
            "-m",
            "support.peer_process",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )
        self.pid = self._process.pid

    def do(self, code: str, **values: Any) -> Any:
        """Run code there, with these names, which stay; what it left in ``answer``."""
        asks = self._process.stdin
        answers = self._process.stdout
        assert asks is not None
        assert answers is not None
        pickle.dump((code, values), asks)
        asks.flush()
        answer, refused = pickle.load(answers)
        if refused is not None:
            raise Refused(refused)
        return answer

    def kill(self) -> None:
        """Kill the process, as the kernel does when memory runs out."""
        self._process.kill()
        with self._process:
            pass

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what code prints is not an answer
    names: dict[str, Any] = {}
    while True:
        try:
            code, values = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        names.update(values, answer=None)
        refused = None
        try:
            exec(code, names)
        except Exception as error:
            names["answer"] = None
            refused = f"{type(error).__name__}: {error}"
        pickle.dump((names["answer"], refused), out)
        out.flush()


if __name__ == "__main__":
    _serve()
