# SPDX-License-Identifier: Apache-2.0
"""Devices that torch does not know: vendors' packages that are absent, broken or not loaded yet.

Each in a process of its own, where torch loads no package of a vendor's by itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from portakv import BackendUnavailable
from portakv.cli import main
from portakv.registry.registry import BUILT_IN, MADE_FOR, REGISTRY, found, trace
from portakv.runtime.devices import DeviceAbsent, Named, indexed, known
from portakv_conformance.cli import main as conform
from portakv_conformance.simdev import build

HERE = Path(__file__).parent
RELEASE = ".".join(torch.__version__.split(".")[:2])
#: What is to be installed, by the type of device.
INSTALL = {
    "npu": f"install torch_npu=={RELEASE}.* beside CANN, and source CANN's set_env.sh",
    "mlu": "install torch_mlu and torch_mlu_ops of Cambricon Neuware",
}
why_not = build.missing()
simulated = pytest.mark.skipif(why_not is not None, reason=why_not or "")


def run(code: str, packages: dict[str, str], folder: Path, *words: str) -> Any:
    """What a fresh process printed as JSON, with these packages installed."""
    for name, text in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    path = os.pathsep.join([str(folder), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONNECT = """
import json, sys
import portakv
from portakv.registry import trace
early = [name for name in sys.modules if name.startswith("torch_")]
try:
    portakv.AdaptiveConnector(sys.argv[1])
    said = ""
except portakv.BackendUnavailable as error:
    said = str(error)
print(json.dumps([early, said, [str(d) for d in trace(sys.argv[1])],
                  portakv.AdaptiveConnector("cpu").explain()]))
"""
RENAMES = "import torch; torch.utils.rename_privateuse1_backend('npu')"
HCCL = "libhccl.so: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize("kind", ["npu", "mlu:1"])
def test_without_the_package_every_candidate_says_what_it_lacks(kind: str, tmp_path: Path) -> None:
    early, said, traced, _ = run(CONNECT, {}, tmp_path, kind)
    assert early == []
    package = kind.partition(":")[0]
    assert said.startswith(
        f"Device {kind!r} was asked for, but torch knows no {package} devices, and torch_{package}"
    )
    # What to install leads, in the words of the backend that knows the release, and is not said
    # again by those that serve any device.
    first = said.splitlines()[0]
    assert first.endswith(f" is not installed; {INSTALL[package]}.")
    # What every candidate says is told on request.
    assert said.endswith(f"portakv backends --device {kind}\n")
    assert "the package of that name" not in said + "".join(traced)
    assert "reference: rejected, it needs the device" in traced
    assert f"cuda: rejected, it runs on cuda devices, not on {package}" in traced
    backend = "ascend" if package == "npu" else "mlu"
    own = next(line for line in traced if line.startswith(f"{backend}: rejected, torch_{package}"))
    assert own.endswith(f"is not installed; {INSTALL[package]}")
    assert [line.partition(":")[0] for line in traced] == [*BUILT_IN]
    assert not any("accepted" in line for line in traced)


def test_where_no_backend_knows_what_to_install_it_is_said_once() -> None:
    with pytest.raises(BackendUnavailable) as refused:
        found("zpu")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(
        "Device 'zpu' was asked for, but torch knows no zpu devices, and torch_zpu is not "
        "installed; install the package of that name by the vendor of the device. "
    )
    assert not any("torch_zpu" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("npu", f"raise ImportError({HCCL!r})", f"ImportError: {HCCL}"),
        ("npu", f"raise OSError({HCCL!r})", f"OSError: {HCCL}"),
        ("npu", "raise RuntimeError('no driver.')", "RuntimeError: no driver"),
        ("npu", f"{RENAMES}; raise OSError('late')", "OSError: late"),
        pytest.param("npu", "import no_such_part", "", marks=pytest.mark.slow),
        pytest.param("npu", "raise SystemExit('no')", "SystemExit: no", marks=pytest.mark.slow),
        ("mlu", "raise OSError('libcnrt.so: undefined symbol')", "OSError: libcnrt.so: undefined"),
        pytest.param("mlu", "raise RuntimeError('CNRT error.')", "RuntimeError: CNRT error",
                     marks=pytest.mark.slow),
    ],
    ids=["ImportError", "OSError", "RuntimeError", "after its name", "half", "SystemExit",
         "mlu, OSError", "mlu, RuntimeError"],
)  # fmt: skip
def test_a_broken_package_is_named_with_its_own_words(
    kind: str, text: str, words: str, tmp_path: Path
) -> None:
    early, said, traced, on_cpu = run(CONNECT, {f"torch_{kind}": text}, tmp_path, kind)
    assert early == [], "import portakv imports no package of a vendor's"
    assert "was chosen" in on_cpu
    first = said.splitlines()[0]
    if words:
        assert f"torch_{kind}" in first
        assert words in first
    else:
        assert f"no_such_part, which torch_{kind} needs, is not installed" in first
    assert INSTALL[kind] in first or "SystemExit" in words
    assert not any("accepted" in line for line in traced)


NAMES_ITSELF = """
import torch
from types import ModuleType
torch.utils.rename_privateuse1_backend("npu")
module = ModuleType("torch.npu")
module.current_device, module.device_count = lambda: 0, lambda: 1
torch._register_device_module("npu", module)
__version__ = "1.11.0"
"""


def test_a_package_that_works_is_imported_and_the_candidates_go_on(tmp_path: Path) -> None:
    """It renames privateuse1, and has no kernels."""
    _, said, traced, _ = run(CONNECT, {"torch_npu": NAMES_ITSELF}, tmp_path, "npu")
    assert said.startswith("No backend can serve npu:0:\n")
    assert f"torch_npu 1.11.0 was found, which is not for torch {torch.__version__}" in said
    assert "reference: rejected, plain torch indexing runs on any torch device; its self" in said
    assert any(line.startswith("reference: rejected") for line in traced)


@pytest.mark.slow
def test_a_package_that_brings_no_device_is_told(tmp_path: Path) -> None:
    _, said, _, _ = run(CONNECT, {"torch_npu": ""}, tmp_path, "npu")
    assert "and torch_npu was imported, but does not bring them" in said.splitlines()[0]


def test_what_a_candidate_imports_may_bring_the_device(tmp_path: Path) -> None:
    """Of a vendor whose package for torch has another name."""
    brings = NAMES_ITSELF.replace('"npu"', '"acme"')
    code = (
        "import json, portakv.registry.registry as registry\n"
        "registry.register_backend('acme', 'acme_kv:Acme')\n"
        "print(json.dumps(str(registry.found('acme'))))\n"
    )
    backend = "from portakv.backends.reference import Reference as Acme\n"
    assert run(code, {"acme_kv": brings + backend}, tmp_path) == "acme:0"


WORKS = {
    "npu": """
from portakv_conformance import simdev
simdev.load("npu")
from portakv_conformance.vendor import ascend_standin
ascend_standin._declare()
globals().update(vars(ascend_standin._module()), __name__="torch_npu")
""",
    "mlu": """
from portakv_conformance import simdev
simdev.load("mlu")
from portakv_conformance.vendor import mlu_standin
mlu_standin.install()
""",
}
CHOOSE = """
import json, sys
from portakv import AdaptiveConnector
connector = AdaptiveConnector(sys.argv[1])
print(json.dumps([str(connector.device), connector.explain()]))
"""


@simulated
@pytest.mark.parametrize(("kind", "backend"), [("npu", "ascend"), ("mlu", "mlu")])
def test_a_package_that_torch_did_not_load_serves(kind: str, backend: str, tmp_path: Path) -> None:
    device, told = run(CHOOSE, {f"torch_{kind}": WORKS[kind]}, tmp_path, kind)
    assert device == f"{kind}:0"
    assert f"backend {backend!r} was chosen" in told


# Names


@pytest.mark.parametrize(
    "text", ["a b", "", "cpu:x", "npu:", ":1", "../npu", "npu:-1", "os.path:0"]
)
def test_what_is_no_name_of_a_device_imports_nothing(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.runtime.devices.imported", lambda *_: pytest.fail("imported"))
    with pytest.raises(DeviceAbsent, match="it is no device of torch's"):
        known(text)
    with pytest.raises(BackendUnavailable, match="was asked for, but"):
        found(text)


def test_devices_of_torch_itself() -> None:
    assert known("cuda:3") == torch.device("cuda", 3)
    assert indexed("cpu:0") == indexed(torch.device("cpu")) == torch.device("cpu")
    assert (str(Named("npu")), str(Named("npu", 2))) == ("npu", "npu:2")


def test_a_device_that_torch_knows_and_cannot_use() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("it can")
    with pytest.raises(BackendUnavailable, match="'mps' was asked for, but torch cannot use it"):
        found("mps")
    assert not any(decision.accepted for decision in trace("mps"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_table_says_what_the_probes_say(name: str) -> None:
    loaded: Any = REGISTRY._loaders[name]()
    elsewhere: Any = Named("zpu")
    only = re.fullmatch(r"it runs on (\w+) devices, not on zpu", loaded.probe(elsewhere).reason)
    assert (only and only.group(1)) == MADE_FOR.get(name)


# The commands


@pytest.mark.parametrize("kind", ["npu", "mlu"])
def test_backends_of_a_device_that_is_not_here(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backends", "--device", kind]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"portakv: no backend is chosen for {kind}.\n"
    text = " ".join(captured.out.split())
    assert f"{kind}, not here" in text
    assert "Neuware" in text if kind == "mlu" else "CANN's" in text
    assert main(["backends", "--device", kind, "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    assert (told["device"], told["count"], told["chosen"]) == (kind, 0, None)
    assert [c["name"] for c in told["candidates"]] == REGISTRY.names()


def test_backends_of_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--device", "cpu", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    assert (told["device"], told["chosen"]) == ("cpu", "reference")


@pytest.mark.parametrize(("backend", "kind"), [("ascend", "npu"), ("mlu", "mlu")])
def test_a_backend_is_judged_on_its_own_kind_of_device(
    backend: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conform([backend]) == 3
    told = capsys.readouterr().err
    assert f"Device {kind!r} was asked for" in told
    assert INSTALL[kind] in told


def test_other_commands_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "epd", "epd", "--device", "zpu"]) == 1
    told = capsys.readouterr().err
    assert "torch knows no zpu devices, and torch_zpu is not installed" in told
    assert told.endswith("portakv backends --device zpu\n")
