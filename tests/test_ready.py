# SPDX-License-Identifier: Apache-2.0
"""Processes that `support.ready` forks are as new ones, but for torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ready

SEEN = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "folder": os.getcwd(),
    "A": os.environ.get("A"),
    "variables": len(os.environ),
    "descriptors": len(os.listdir("/proc/self/fd")),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "library": [name for name in sys.modules if name.partition(".")[0].startswith("portakv")],
}))
"""


def test_a_process_sees_what_a_new_one_sees(tmp_path: Path) -> None:
    variables = {"A": "a", "PYTHONPATH": f"{tmp_path}{os.pathsep}/nowhere"}
    words = ["-c", SEEN, "one", "two words"]
    done = ready.run(*words, env=variables, cwd=tmp_path)
    new = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.path))"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert len(seen.pop("path")) == int(new.stdout)
    assert seen == {
        "argv": ["-c", "one", "two words"],
        "folder": str(tmp_path),
        "A": "a",
        "variables": 2,
        "descriptors": 4,  # the fourth reads the folder
        "main": True,
        "library": [],
    }


@pytest.mark.parametrize(
    ("code", "ended", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'end', file=sys.stderr)", 0, "end\n"),
    ],
)
def test_its_end_is_reported(code: str, ended: int, error: str) -> None:
    done = ready.run("-c", code)
    assert done.returncode == ended
    assert error in done.stderr
    assert bool(error) == bool(done.stderr)


def test_it_is_killed_after_its_time_and_by_a_signal() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        ready.run("-c", "import time; time.sleep(99)", timeout=0.1)
    pipe = subprocess.PIPE
    with ready.Python("-c", "print(input(), flush=True); input()", stdin=pipe, stdout=pipe) as own:
        assert own.stdin is not None
        assert own.stdout is not None
        own.stdin.write(b"a line\n")
        own.stdin.flush()
        assert own.stdout.readline() == b"a line\n"
        assert own.poll() is None
        own.send_signal(signal.SIGTERM)
    assert own.returncode == -signal.SIGTERM
