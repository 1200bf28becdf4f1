# SPDX-License-Identifier: Apache-2.0
"""An installed PortaKV, as a visitor's own tools see it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import python
from support.waits import LIMIT

pytestmark = pytest.mark.visitor

SCRIPT = """\
import torch
from portakv import AdaptiveConnector, KVView, copy_blocks, copy_rows
from portakv.view.index import Index

view = KVView([torch.zeros(2, 4, 16, 2, 8)], "vllm-nhd")
reveal_type(view)
reveal_type(copy_rows(view, view, Index([0]), Index([1])))
reveal_type(copy_blocks)
reveal_type(AdaptiveConnector.from_gpu)
reveal_type(AdaptiveConnector.register_kv_caches)
"""


@pytest.fixture(scope="module")
def mypy_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the output of mypy for a script that lies outside the clone."""
    pytest.importorskip("mypy", reason="it comes with the extra `lint`")
    folder = tmp_path_factory.mktemp("visitor")
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    return done.stdout + done.stderr


def test_static_tools_find_the_package(mypy_output: str) -> None:
    assert 'Revealed type is "portakv.view.view.KVView"' in mypy_output
    assert 'Revealed type is "portakv.copy.handle.BlockTransfer"' in mypy_output
    assert "error:" not in mypy_output


def test_public_ids_caches_and_chunks_have_types(mypy_output: str) -> None:
    """The three signatures name what they take."""
    revealed = re.findall(r'Revealed type is "(def .*)"', mypy_output)
    assert len(revealed) == 3
    for signature in revealed:
        assert not re.search(r": Any\b", signature), signature


def test_the_old_places_of_public_names_still_work() -> None:
    """Readers, vendors and the suite import them from there, for one release."""
    code = (
        "from portakv.backends.base import Backend, Capabilities, Decision, Launch, Pending\n"
        "from portakv.host.pinned import empty\nfrom portakv.errors import PortaKVError\n"
        "from portakv.plan import CopyPlan\nfrom portakv.view import KVView\n"
    )
    python("-c", code)


def test_the_readme_s_links_hold_outside_the_clone() -> None:
    """The package index shows the README too, where a relative link leads nowhere."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
