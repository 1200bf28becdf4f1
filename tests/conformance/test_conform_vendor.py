# SPDX-License-Identifier: Apache-2.0
"""The worked vendor package: short, installed as anybody's, found by the registry, and right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.conform_runs import ROOT, python

from portakv_conformance.simdev import build

EXAMPLE = ROOT / "examples" / "vendor_backend"
why_not = build.missing()
simulated = pytest.mark.skipif(why_not is not None, reason=why_not or "")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the package, without anything from the network."""
    source = tmp_path_factory.mktemp("source") / "vendor_backend"
    shutil.copytree(EXAMPLE, source)  # building leaves files in the tree
    target = tmp_path_factory.mktemp("installed")
    words = ("-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(source))
    done = python("-m", "pip", "install", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(installed: Path, *command: str, **variables: str) -> str:
    """Return the output of Python with the package installed."""
    path = os.pathsep.join([str(installed), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = python(*command, where=ROOT, PYTHONPATH=path, COLUMNS="200", **variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_guide_shows_the_backend_as_it_is() -> None:
    guide = (ROOT / "docs" / "extending.md").read_text()
    code = (EXAMPLE / "acme.py").read_text()
    assert len(code.splitlines()) < 60, "it is short enough to read"
    assert code[code.index("from __future__") :] in guide
    project = (EXAMPLE / "pyproject.toml").read_text()
    entry = '[project.entry-points."portakv.backends"]\nacme = "acme:Acme"\n'
    assert entry in project
    assert entry in guide


@pytest.mark.full
def test_the_registry_lists_it_and_says_why_not_on_a_cpu(installed: Path) -> None:
    code = "from portakv.registry.registry import trace; print(*trace('cpu'), sep='\\n')"
    listed = run(installed, "-c", code)
    assert "acme: rejected, it serves Acme cards (simdev), not cpu" in listed


@simulated
@pytest.mark.full
def test_it_copies_by_the_drivers_call(installed: Path) -> None:
    code = (
        "import torch; from support.simdev_cases import DEVICE; from portakv import *\n"
        "from support.device_cases import check, gathered, make_caches, make_chunk, scattered\n"
        "c, side = AdaptiveConnector(DEVICE), torch.Stream(DEVICE)\n"
        "assert 'acme' in c.explain(), c.explain()\n"
        "caches, slots = make_caches(device=DEVICE), [9, 2, 17, 6, 0, -1]\n"
        "for place in (DEVICE, 'pinned', 'cpu'):\n"
        "    chunk = make_chunk(6, device='cpu' if place == 'pinned' else place)\n"
        "    chunk = chunk.pin_memory() if place == 'pinned' else chunk\n"
        "    wanted = gathered(caches, chunk, slots)\n"
        "    c.from_gpu(chunk, caches, slots, stream=side).synchronize()\n"
        "    check([chunk], [wanted])\n"
        "    back = scattered(caches, chunk, slots)\n"
        "    ids = torch.tensor(slots, device=DEVICE)\n"
        "    c.to_gpu(chunk, caches, ids, stream=side).synchronize(); check(caches, back)\n"
        "print(c._choice.name)"
    )
    assert run(installed, "-c", code, SIMDEV_NAME="simdev") == "acme\n"


@simulated
@pytest.mark.slow
def test_the_suite_certifies_it_on_the_simulated_device(installed: Path, tmp_path: Path) -> None:
    report = str(tmp_path / "out")
    output = run(
        installed, "-m", "portakv", "conform", "acme", "--device=simdev", "--report", report
    )
    assert "conformant, R3" in output
    verified = run(installed, "-m", "portakv", "conform", "verify", f"{report}/conformance.json")
    assert "stands: acme on" in verified
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
