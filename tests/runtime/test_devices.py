# SPDX-License-Identifier: Apache-2.0
"""Devices that torch does not know: vendors' packages that are absent, broken or not loaded yet;
names; the current device and process.

Tests that import a package run a separate process, where torch loads none by itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support import ready
from support.waits import LIMIT

from portakv import AdaptiveConnector, BackendUnavailable, DeviceMismatch
from portakv.registry.registry import BUILT_IN, MADE_FOR, REGISTRY, available_device, trace
from portakv.runtime.devices import (
    DeviceAbsent,
    Named,
    capturing,
    devices_present,
    indexed,
    inside,
    known,
    refuse_capture,
    resolve,
    this_process,
    usable_device,
)
from portakv.runtime.streams import own_stream
from portakv_conformance.cli import main as conform
from portakv_conformance.simdev import build

HERE = Path(__file__).parent
RELEASE = ".".join(torch.__version__.split(".")[:2])
#: What is to be installed, by the type of device.
INSTALL = {
    "npu": f"install torch_npu=={RELEASE}.* and CANN, and source CANN's set_env.sh",
    "mlu": "install torch_mlu and torch_mlu_ops of Cambricon Neuware",
}
BACKEND = {"npu": "ascend", "mlu": "mlu"}
why_not = build.missing()
# torch_npu and torch_mlu behave alike here: one of them is enough unless all tests are requested.
KINDS = ["npu", pytest.param("mlu", marks=pytest.mark.slow)]


def run(code: str, packages: dict[str, str], folder: Path, *words: str) -> Any:
    """Return the JSON that a fresh process prints with these packages installed."""
    for name, text in packages.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    path = os.pathsep.join([str(folder), str(HERE.parent)])
    done = ready.run("-c", code, *words, env={**os.environ, "PYTHONPATH": path}, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONNECT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
import portakv
from portakv.cli import main
from portakv.registry.registry import trace
assert not [name for name in sys.modules if name.startswith("torch_")], "a vendor's was imported"
reports = []
for kind in sys.argv[1:]:
    try:
        portakv.AdaptiveConnector(kind)
    except portakv.BackendUnavailable as error:
        reports.append([str(error), [str(decision) for decision in trace(kind)]])
    for words in ([], ["--json"]):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
            code = main(["backends", "--device", kind, *words])
        reports[-1] += [code, out.getvalue(), error.getvalue()]
assert "was chosen" in portakv.AdaptiveConnector("cpu").explain()
print(json.dumps(reports))
"""
RENAMES = "import torch; torch.utils.rename_privateuse1_backend('npu')"
HCCL = "libhccl.so: cannot open shared object file: No such file or directory"


@pytest.mark.full
def test_without_the_package_every_candidate_says_what_it_lacks(tmp_path: Path) -> None:
    kinds = ["npu", "mlu:1"]
    for kind, report in zip(kinds, run(CONNECT, {}, tmp_path, *kinds), strict=True):
        message, traced, code, out, err, json_code, as_json, _ = report
        package = kind.partition(":")[0]
        assert message.startswith(
            f"Expected a device of this machine, got {kind!r}: torch knows no {package} devices, "
            f"and torch_{package}"
        )
        # The message leads with what to install; the command lists what each candidate lacks.
        (first,) = message.splitlines()
        assert f" is not installed; {INSTALL[package]}. Fix that, or pass a device " in first
        assert first.endswith(
            f"machine: cpu. `portakv backends --device {kind}` lists every candidate's decision."
        )
        assert any("reference: rejected" in t and "it needs the device" in t for t in traced)
        assert f"cuda: rejected, it runs on cuda devices, not on {package}" in traced
        own = f"{BACKEND[package]}: rejected, torch_{package}"
        (line,) = [line for line in traced if line.startswith(own)]
        assert line.endswith(f"is not installed; {INSTALL[package]}")
        assert [line.partition(":")[0] for line in traced] == [*BUILT_IN]
        assert not any("accepted" in line for line in traced)
        # The output of `portakv backends`, as text and as JSON.
        assert (code, json_code, err) == (1, 1, f"portakv: no backend is chosen for {kind}.\n")
        text = " ".join(out.split())
        assert f"{kind}, not here" in text
        assert ("Neuware" if package == "mlu" else "CANN's") in text
        (device,) = json.loads(as_json)["devices"]
        assert (device["device"], device["count"], device["chosen"]) == (kind, 0, None)
        assert [c["name"] for c in device["candidates"]] == REGISTRY.names()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CPU", "cpu"), ("Cuda:1", "cuda:1"), ("nvidia", "cuda"), ("rocm:2", "cuda:2"),
        ("hip", "cuda"), ("HIP:0", "cuda:0"), ("hip:1", "cuda:1"), ("dcu", "cuda"),
        ("ascend", "npu"), ("cuda0", "cuda"), ("npuu", "npu"), ("gpu", ""), ("GPU:1", ":1"),
        ("nonsense", None), ("tpu", None),
    ],
)  # fmt: skip
def test_a_name_unknown_to_torch_suggests_the_device_meant(name: str, meant: str | None) -> None:
    """And names no package: the project knows of none."""
    if name.lower().startswith("gpu"):
        here = torch.accelerator.current_accelerator()
        meant = ("cuda" if here is None else here.type) + (meant or "")
    kind = name.partition(":")[0]
    present = ", ".join(map(str, devices_present()))
    why = f"torch knows no {kind} devices"
    if kind.lower() in ("nvidia", "rocm", "hip", "dcu", "ascend"):
        why = f"torch calls {kind} devices {str(meant).partition(':')[0]}"
    hint = "." if meant is None else f"; did you mean {meant!r}?"
    with pytest.raises(BackendUnavailable) as refused:
        available_device(name)
    assert str(refused.value) == (
        f"Expected a device of this machine, got {name!r}: {why}{hint} Pass a device of this "
        f"machine: {present}."
    )
    with pytest.raises(BackendUnavailable) as host:
        resolve(name)
    assert str(host.value).endswith(f"{hint} Name a device of this machine, or leave it out.")
    with pytest.raises(DeviceMismatch) as command:
        usable_device(name)
    assert hint.rstrip(".") in str(command.value)
    assert "torch_" not in str(command.value) + str(refused.value)


@pytest.mark.parametrize(
    "packages",
    [
        {
            "npu": (f"raise ImportError({HCCL!r})", f"ImportError: {HCCL}"),
            "mlu": ("raise OSError('libcnrt.so: not found')", "OSError: libcnrt.so: not found"),
        },
        pytest.param(
            {
                "npu": (f"{RENAMES}; raise OSError('late')", "OSError: late"),
                "mlu": ("raise RuntimeError('CNRT error.')", "RuntimeError: CNRT error"),
            },
            marks=pytest.mark.full,
        ),
        pytest.param(
            {
                "npu": ("import no_such_part", "no_such_part, which torch_npu needs, is not"),
                "mlu": ("raise SystemExit('no')", "SystemExit: no"),
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["immediately", "after its name", "half"],
)
def test_a_broken_package_s_own_words(packages: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    texts = {f"torch_{kind}": text for kind, (text, _) in packages.items()}
    reports = run(CONNECT, texts, tmp_path, *packages)
    for (kind, (_, words)), (message, traced, *_) in zip(packages.items(), reports, strict=True):
        first = message.splitlines()[0]
        assert f"torch_{kind}" in first
        assert words in first
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


@pytest.mark.full
def test_a_package_that_works_is_imported_and_the_candidates_go_on(tmp_path: Path) -> None:
    """It renames privateuse1, and has no kernels."""
    packages = {"torch_npu": NAMES_ITSELF, "torch_mlu": ""}
    (message, traced, *_), (nothing, *_) = run(CONNECT, packages, tmp_path, "npu", "mlu")
    assert message.startswith("Expected a backend to serve npu:0, but none can:\n")
    assert f"torch_npu 1.11.0 is installed, which is not for torch {torch.__version__}" in message
    assert "reference: rejected, plain torch indexing runs on any torch device; its self" in message
    assert any(line.startswith("reference: rejected") for line in traced)
    assert "and torch_mlu was imported, but does not bring them" in nothing.splitlines()[0]


@pytest.mark.full
def test_what_a_candidate_imports_may_bring_the_device(tmp_path: Path) -> None:
    """The vendor's package for torch has another name."""
    brings = NAMES_ITSELF.replace('"npu"', '"acme"')
    code = (
        "import json, portakv.registry.registry as registry\n"
        "registry.register_backend('acme', 'acme_kv:Acme')\n"
        "print(json.dumps(str(registry.available_device('acme'))))\n"
    )
    backend = "from portakv.backends.reference import Reference as Acme\n"
    assert run(code, {"acme_kv": brings + backend}, tmp_path) == "acme:0"


WORKS = {
    "npu": """
import torch
from portakv_conformance import simdev
simdev.load("npu")
from portakv_conformance.vendor import ascend_standin
ascend_standin._declare()
EMULATED, __version__, npu = True, torch.__version__, torch.get_device_module("npu")
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


@pytest.mark.skipif(why_not is not None, reason=why_not or "")
@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_torch_did_not_load_serves(kind: str, tmp_path: Path) -> None:
    device, explanation = run(CHOOSE, {f"torch_{kind}": WORKS[kind]}, tmp_path, kind)
    assert device == f"{kind}:0"
    assert f"backend {BACKEND[kind]!r} was chosen" in explanation


# Names


class NoVendor:
    """Fails a test that imports a vendor's package."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch_npu":
            pytest.fail(f"imported {name}")


@pytest.mark.parametrize(
    "text", ["a b", "", "cpu:x", "npu:", ":1", "../npu", "npu:-1", "os.path:0"]
)
def test_what_names_no_device_imports_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [NoVendor(), *sys.meta_path])
    with pytest.raises(DeviceAbsent, match="it is not a device of torch"):
        known(text)
    with pytest.raises(BackendUnavailable, match="Expected a device of this machine, got"):
        available_device(text)


def test_a_device_s_name_imports_its_vendor_s_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would see it."""
    monkeypatch.setattr(sys, "meta_path", [NoVendor(), *sys.meta_path])
    with pytest.raises(pytest.fail.Exception, match="imported torch_npu"):
        known("npu:0")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99", torch.device("cuda", 99), "mps"])
def test_a_device_that_torch_does_not_find_is_one_line(device: str | torch.device) -> None:
    """It has the reason and what to do; a command lists each backend's decision."""
    count = torch.get_device_module(torch.device(device).type).device_count()
    if count and "99" not in str(device):
        pytest.skip("torch finds that device here")
    with pytest.raises(BackendUnavailable) as refused:
        AdaptiveConnector(device)
    line = str(refused.value)
    lacks = not (device == "mps" or torch.backends.cuda.is_built())
    assert line.startswith(
        f"Expected a device of this machine, got '{device}': torch cannot use it here ("
    )
    assert ("; install torch's build for CUDA, or for ROCm. Fix that, or pass a " in line) == lacks
    assert (f"it finds {count} of that type, and counts from 0" in line) == (count > 0)
    assert line.endswith(f"`portakv backends --device {device}` lists every candidate's decision.")
    assert "\n" not in line
    assert not any(decision.accepted for decision in trace(device))


def test_a_driver_that_fails_is_seen_behind_an_index_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML may count devices that the driver then does not begin with."""
    failing = Mock(side_effect=RuntimeError("No driver.\nA long log."))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", failing)
    with pytest.raises(DeviceAbsent, match=r"torch cannot use it here \(No driver\)"):
        indexed("cuda:0")


def test_devices_of_torch_itself() -> None:
    assert known("cuda:3") == torch.device("cuda", 3)
    assert indexed("cpu:0") == indexed(torch.device("cpu")) == torch.device("cpu")
    assert (str(Named("npu")), str(Named("npu", 2))) == ("npu", "npu:2")


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_table_says_what_the_probes_say(name: str) -> None:
    loaded = REGISTRY.class_of(name)
    elsewhere: Any = Named("zpu")
    only = re.fullmatch(r"it runs on (\w+) devices, not on zpu", loaded.probe(elsewhere).reason)
    assert (only and only.group(1)) == MADE_FOR.get(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_is_judged_on_its_own_kind(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert conform([BACKEND[kind]]) == 3
    output = capsys.readouterr().err
    assert f"got {kind!r}: " in output
    assert INSTALL[kind] in output


# The current device, captures, processes


def test_inside_a_stream_it_is_the_current_one(accelerator: torch.device) -> None:
    before = torch.accelerator.current_stream(accelerator.index)
    stream = own_stream(accelerator)
    with inside(stream), inside(None), inside(torch.device("cpu")):
        assert torch.accelerator.current_stream(accelerator.index).stream_id == stream.stream_id
    assert torch.accelerator.current_stream(accelerator.index) == before
    last = torch.get_device_module(accelerator).device_count() - 1
    with inside(torch.device(accelerator.type, last)):
        assert torch.accelerator.current_device_index() == last
        assert not capturing(accelerator)
    assert torch.accelerator.current_device_index() == 0


def test_what_cannot_be_captured_is_told_with_what_to_do() -> None:
    assert str(refuse_capture()) == (
        "Preparing a copy inside graph capture: its kernel has to be compiled and loaded first; "
        "make the same call once before the capture."
    )
    assert str(refuse_capture("A wait", "it blocks")) == "A wait inside graph capture: it blocks."
    assert not capturing(torch.device("cpu"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_is_another_one() -> None:
    parent = this_process()
    assert this_process() is parent
    assert not parent.forked
    child = os.fork()
    if not child:
        grandchild = os.fork()
        process = this_process()
        code = 0 if parent.forked and process is not parent and not process.forked else 1
        if grandchild:
            code |= os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not parent.forked
    assert this_process() is parent
