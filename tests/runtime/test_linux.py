# SPDX-License-Identifier: Apache-2.0
"""What runs on another system than Linux, and what is refused there by one sentence.

A child process hides what only Linux has: `fcntl`, eventfd and its relatives, and files of
``/proc`` and ``/sys``.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from support import ready
from support.waits import LIMIT

from portakv.cli import VERBS as COMMANDS

pytestmark = pytest.mark.xdist_group("linux")  # one process makes one child

#: Runs before PortaKV is imported. torch itself may need Linux's files, so it is imported first.
HIDE = """
import builtins, io, os, sys
import numpy, torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for name in [*vars(os)]:
    if name.lower().startswith(("eventfd", "efd_", "pidfd", "memfd", "mfd_", "o_direct", "sched_")):
        delattr(os, name)

def hides(function):
    def opened(path, *args, **terms):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "hidden by a test", path)
        return function(path, *args, **terms)
    return opened

builtins.open = io.open = hides(io.open)
os.open, os.listdir = hides(os.open), hides(os.listdir)
sys.platform = "darwin"
"""
#: Runs each text of a dictionary, and prints what it printed and the error that ended it.
EACH = """
import contextlib, json
answers = {}
for name, code in json.loads(sys.argv[1]).items():
    printed, failed = io.StringIO(), ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(code, {"torch": torch})
        except SystemExit as error:
            failed = f"exit {error.code}"
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    answers[name] = [failed, printed.getvalue()]
print(json.dumps(answers))
"""
COMMAND = "import sys; from portakv.cli import main; sys.exit(main({words}))"
#: What runs anywhere: a copy by views, a copy by a connector, and the options of both.
COPY = """
import portakv
caches = [torch.randn(2, 8, 16, 2, 8, device="cpu") for _ in range(2)]
pool = torch.zeros(8, 2, 2, 16, 2, 8, device="cpu")
views = portakv.KVView(caches, "vllm-nhd"), portakv.KVView(pool, "flexkv-blockfirst")
portakv.copy_blocks(*views, [7, 3], [0, 1], backend="reference").synchronize()
assert torch.equal(pool[0, 1], caches[1][:, 7])
connector = portakv.AdaptiveConnector("cpu")
connector.register_kv_caches(caches)
chunk = torch.zeros(2, 2, 20, 16, device="cpu")
slots = torch.arange(20, device="cpu")
connector.from_gpu(chunk, slot_mapping=slots).synchronize()
assert torch.equal(chunk[0, 1, :16], caches[1][0, 0].flatten(1))
print("copied")
"""
STORE = """
from portakv import KVView
from portakv.storage import BlockForm, BlockStore
view = KVView([torch.zeros(2, 8, 16, 2, 8, device="cpu")], "vllm-nhd")
form = BlockForm.of(view, model="a test's")
"""
REFUSED = {
    "a block store": STORE + "BlockStore(form, host=1 << 20, staging=1 << 20)",
    "host memory": "from portakv.host import pinned; pinned.empty((4,), torch.uint8)",
    "migration": "import portakv.migrate",
    "serving": "import portakv.serving",
}
NEEDS = "it needs Linux, and this system is darwin"
VERBS = [
    ("layouts vllm-nhd", 0, "vllm-nhd"),
    ("explain vllm-nhd flexkv-blockfirst", 0, "reference"),
    ("explain --host", 0, "zero_copy"),
    ("explain --hooks http://127.0.0.1:1", 1, f"`portakv explain --hooks`: {NEEDS}"),
    ("explain --peer", 1, f"migration between processes: {NEEDS}"),
    ("explain --storage /tmp", 1, NEEDS),
    ("backends", 0, "reference"),
    ("doctor", 0, "extra"),
    ("doctor --kv-transfer-config {}", 1, f"`portakv doctor --kv-transfer-config`: {NEEDS}"),
    ("doctor --l2-adapter {}", 1, f"`portakv doctor --l2-adapter`: {NEEDS}"),
    ("doctor --hicache-config {}", 1, f"`portakv doctor --hicache-config`: {NEEDS}"),
    ("conform --list", 0, "test_"),
    ("conform --tier a:B", 2, f"`portakv conform --tier`: {NEEDS}"),
    ("conform --contract io threads", 2, f"`portakv conform --contract`: {NEEDS}"),
    ("store show /tmp", 1, f"`portakv store`: {NEEDS}"),
    ("store serve /tmp", 1, f"`portakv store`: {NEEDS}"),
    ("witness show nothing.zip", 2, "Expected FILE to be a file that a witness wrote"),
    ("top /tmp", 1, f"`portakv top`: {NEEDS}"),
    ("top http://127.0.0.1:1/metrics", 1, "Expected a metrics page"),
    ("demo --device nonsense", 1, "torch cannot use it here"),
    ("warmup --arch 90 --shape none-of-them", 1, "Expected a shape of a model"),
    ("calibrate --device cpu", 1, "Expected an accelerator"),
    ("bench", 1, f"`portakv bench`: {NEEDS}"),
    ("bench --storage --dir /tmp", 1, f"`portakv bench`: {NEEDS}"),
]


def test_the_lines_have_each_verb() -> None:
    assert {line.split()[0] for line, *_ in VERBS} == {*COMMANDS}


def elsewhere(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that lacks what only Linux has."""
    return ready.run("-c", HIDE + code, *words, timeout=LIMIT)


def test_what_is_hidden_is_missing() -> None:
    """The other tests of this file could not fail if the child had Linux's parts."""
    code = """
import importlib
for what in (lambda: importlib.import_module("fcntl"), lambda: os.eventfd(0),
             lambda: open("/proc/meminfo"), lambda: os.open("/proc/self/maps", 0)):
    try:
        what()
    except (ImportError, AttributeError, OSError):
        continue
    sys.exit("a part of Linux is there")
"""
    done = elsewhere(code)
    assert done.returncode == 0, done.stderr


def test_copies_run_on_any_system() -> None:
    done = elsewhere(COPY)
    assert (done.stdout, done.returncode) == ("copied\n", 0), done.stderr


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[str, str]]:
    """The error and the output of each part and each verb, all in one process."""
    codes = {**REFUSED, **{line: COMMAND.format(words=line.split()) for line, *_ in VERBS}}
    done = elsewhere(EACH, json.dumps(codes))
    assert done.returncode == 0, done.stderr
    read: dict[str, tuple[str, str]] = json.loads(done.stdout)
    return read


@pytest.mark.parametrize("part", REFUSED)
def test_the_rest_says_that_it_needs_linux(part: str, answers: dict[str, tuple[str, str]]) -> None:
    (failed, _) = answers[part]
    assert failed.startswith("Unsupported: ")
    assert failed.endswith(": it needs Linux, and this system is darwin; run it on Linux.")


@pytest.mark.parametrize(("line", "code", "words"), VERBS, ids=[line for line, *_ in VERBS])
def test_each_verb_runs_or_says_that_it_needs_linux(
    line: str, code: int, words: str, answers: dict[str, tuple[str, str]]
) -> None:
    (failed, printed) = answers[line]
    assert (failed, words in " ".join(printed.split())) == (f"exit {code}", True), printed


@pytest.mark.slow
def test_the_demo_runs_on_any_system() -> None:
    done = elsewhere(COMMAND.format(words=["demo", "--device", "cpu"]))
    assert done.returncode == 0, done.stderr
    assert "bit-identical" in done.stdout
