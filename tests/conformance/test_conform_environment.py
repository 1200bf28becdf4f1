# SPDX-License-Identifier: Apache-2.0
"""A report describes the backend's source, the machine it ran on, and a vendor's device: its name,
its driver and the vendor's packages."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from portakv.backends.base import Capabilities
from portakv.backends.reference import Reference
from portakv.runtime.hip import DriverMissing
from portakv_conformance.evidence import environment
from portakv_conformance.evidence.environment import describe_environment, driver_version
from portakv_conformance.evidence.source import SourceError, source_files, source_sha256
from portakv_conformance.judge.subject import Subject, subject


@pytest.fixture(scope="module")
def judged() -> Subject:
    return subject("reference", "cpu")


def test_each_file_of_a_third_party_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that is compiled from it. A module by itself is its file."""
    names = {"__init__.py", "backend.py", "inner/__init__.py", "inner/kernel.cu"}
    vendor = tmp_path / "acme_rows"
    for folder in ("inner", "__pycache__"):
        (vendor / folder).mkdir(parents=True)
    for file in (tmp_path / "acme_alone.py", *(vendor / name for name in names)):
        file.write_text("# as it was\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(source_files("acme_rows.backend")) == names
    before = source_sha256("acme_rows.backend:Acme")
    assert re.fullmatch("[0-9a-f]{64}", before)
    for name in "__pycache__/backend.py", "notes.txt":
        (vendor / name).write_text("")
    assert source_sha256("acme_rows.backend:Acme") == before
    for name in names:
        (vendor / name).write_text("# changed\n")
        after = source_sha256("acme_rows.backend:Acme")
        assert after != before
        before = after
    assert list(source_files("acme_alone")) == ["acme_alone.py"]
    for name in ("no_such_module.at.all", "sys", "no such"):
        with pytest.raises(SourceError, match="module"):
            source_sha256(f"{name}:Class")


VENDOR = "portakv_conformance.vendor"


@pytest.mark.parametrize(("module", "files"), [
    ("portakv.backends.cuda",
     "portakv.backends.cuda.py portakv.runtime.cuda.py portakv_native.cuda/rows.cuh"),
    # What any kernel is given counts here, and the text of the CUDA kernel does not.
    ("portakv.backends.compiled", "portakv.backends.strided.py portakv.backends._sides.py"),
    ("portakv.backends.triton", "portakv.backends._triton_rows.py portakv.backends._sides.py"),
    ("portakv.backends.hip", "portakv.runtime.hip.py portakv_native.cuda/pack.cuh"),
    ("portakv.backends.ascend", "portakv_native.ascend/rows.h"),
    ("portakv.backends.reference", "portakv.backends.reference.py portakv.backends.strided.py"),
    # What emulates: a change ends every level that it carried.
    ("portakv_conformance.simdev", "device.cpp operators.h device_module.py"),
    (f"{VENDOR}.mlu_standin", f"{VENDOR}.mlu_standin.py"),
    (f"{VENDOR}.ascend_standin", f"{VENDOR}.ascend_ops.py {VENDOR}/ascend_schemas.toml"),
    (f"{VENDOR}.ascend_device",
     f"{VENDOR}.ascend_ops.py {VENDOR}.cann_stub.py {VENDOR}/cann_stub.c"),
    (f"{VENDOR}.hip_emulated",
     f"{VENDOR}.cpp.py {VENDOR}/hip_fake.cpp {VENDOR}/warps_on_cpu.h"),
    (f"{VENDOR}.ascendc_emulated",
     "portakv_native.ascend/emulation/machine.h portakv_native.ascend/rows.h"),
])  # fmt: skip
def test_a_module_of_ours_counts_with_what_it_builds_on(module: str, files: str) -> None:
    result = set(source_files(module))
    assert set(files.split()) <= result
    assert not any(name.endswith(".base.py") for name in result)
    if module.startswith("portakv.backends"):
        native = any(name.startswith("portakv_native") for name in result)
        assert native == ("portakv_native" in files)
        # No backend expires with another one's driver or kernel.
        remote = {"cuda": "runtime.hip", "ascend": "native.cuda", "hip": "backends.cuda"}
        other = remote.get(module.rpartition(".")[2], "backends.rows_")
        assert not [name for name in result if other in name]


def test_a_source_that_is_not_here_is_told(judged: Subject) -> None:
    described = environment.describe_backend(replace(judged, target="no_such_module:Class"))
    assert described["source_sha256"].startswith("unknown: module 'no_such_module'")


def test_who_emulates(judged: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Reference):
        emulated = True

    triton = replace(judged, target="portakv.backends.triton:Triton")
    model = replace(judged, backend=Model(torch.device("cpu")))
    assert [environment.is_emulated(each) for each in (judged, triton, model)] == [0, 0, 1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [environment.is_emulated(each) for each in (judged, triton)] == [0, 1]


def test_claims_and_nonsense_in_plain_values() -> None:
    claims = environment.plain(Capabilities(places=frozenset({("host", "host"), ("a", "b")})))
    assert claims["places"] == [["a", "b"], ["host", "host"]]
    assert (claims["index_dtypes"], claims["max_loops"]) == (["int32", "int64"], None)
    assert environment.plain({1: object, "a": {3, "b"}, "c": (torch.float16, 1.5)}) == {
        "1": "<class 'object'>",
        "a": [3, "b"],
        "c": ["float16", 1.5],
    }


# -- a vendor's device ----------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)
NVIDIA_SMI = '#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo 580.159.04\n'
CAMBRICON = "proc/driver/cambricon/mlus/0000:0{}:00.0/information"
MLU = "Device name: MLU590\n"


def device(kind: str) -> Any:
    """Return a device of a type that torch knows only together with the vendor's package."""
    return SimpleNamespace(type=kind, index=0)


Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a machine with these files, and no driver's files or tools besides. ``hip``: with a
    torch for ROCm, and the HIP libraries of that version; 0 for none."""

    def make(files: dict[str, str], hip: int | None = None) -> None:
        def driver() -> Any:
            if not hip:
                raise DriverMissing("the HIP runtime cannot be loaded")
            return SimpleNamespace(number={"hipRuntimeGetVersion": hip}.__getitem__)

        monkeypatch.setattr(environment, "ROOT", tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        properties = SimpleNamespace(name="", gcnArchName="gfx906:sramecc+:xnack-")
        monkeypatch.setattr(torch.version, "hip", None if hip is None else "6.3.42134")
        monkeypatch.setattr("portakv.runtime.hip.driver", driver)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: properties.name)

    return make


@pytest.mark.parametrize(("kind", "hip", "files", "driver"), [
    *((kind, None, {}, "") for kind in ("cuda", "npu", "mlu", "xpu", "cpu")),
    ("cuda", None, {"bin/nvidia-smi": NVIDIA_SMI}, "580.159.04"),
    ("cuda", None, {"bin/nvidia-smi": "#!/bin/sh\nexit 9\n"}, ""),
    ("cuda", 0, {}, ""),
    ("cuda", 0, {"bin/nvidia-smi": NVIDIA_SMI}, ""),  # it is about other devices
    *(("cuda", 0, {f"sys/module/{module}/version": "6.12.12\n"}, f"{module} 6.12.12")
      for module in ("amdgpu", "hydcu", "hycu")),
    # The module of the Linux tree has no version: that of HIP's runtime then.
    ("cuda", 60342134, {}, "HIP 6.3.42134"),
    ("cuda", 60342134, {"sys/module/amdgpu/version": "6.12.12\n"}, "amdgpu 6.12.12"),
    ("npu", None,
     {"usr/local/Ascend/driver/version.info": "ascendhal_version=7\nVersion=24.1.0\n"}, "24.1.0"),
    ("mlu", None, {CAMBRICON.format(1): MLU}, ""),
    ("mlu", None, {CAMBRICON.format(1): MLU, CAMBRICON.format(2): f"{MLU}Driver Version: v5.10.29"},
     "v5.10.29"),
])  # fmt: skip
def test_a_driver_is_told_by_the_vendor_s_own_files(
    kind: str, hip: int | None, files: dict[str, str], driver: str, machine: Machine
) -> None:
    machine(files, hip)
    assert driver_version(CUDA if kind == "cuda" else device(kind)) == driver


def test_another_vendor_s_extension_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6 needs a driver of any accelerator, so any has to be able to say it."""
    properties = SimpleNamespace(driver_version="5.2.1")
    extension = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "acme", extension, raising=False)
    assert driver_version(device("acme")) == "5.2.1"
    del properties.driver_version
    assert driver_version(device("acme")) == ""
    del extension.get_device_properties
    assert driver_version(device("acme")) == ""


def test_a_hip_device(machine: Machine) -> None:
    machine({"sys/module/hydcu/version": "5.16.29\n"}, 0)
    on_it = replace(subject("reference", "cpu"), device=CUDA)
    facts = describe_environment(on_it, "cuda")
    shown = {name: facts.get(name) for name in ("driver", "hip", "architecture", "cuda")}
    assert shown == {
        "driver": "hydcu 5.16.29",
        "hip": "6.3.42134",
        "architecture": "gfx906:sramecc+:xnack-",
        "cuda": None,
    }
    assert facts["device_name"] == facts["architecture"], "some DCUs have no name"
    assert describe_environment(replace(on_it, emulated=True), "cuda")["driver"] == ""


def test_ascends_toolkit_is_asked_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    utils: Any = ModuleType("torch_npu.utils")
    utils.get_cann_version = lambda: "8.3.RC1"
    module = SimpleNamespace(get_device_name=lambda _: "Ascend910B1")
    on_it = replace(subject("reference", "cpu"), device=device("npu"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert "cann" not in describe_environment(on_it, "npu")
    monkeypatch.setitem(sys.modules, "torch_npu.utils", utils)
    facts = describe_environment(on_it, "npu")
    assert (facts["cann"], facts["device_name"]) == ("8.3.RC1", "Ascend910B1")
    utils.get_cann_version = lambda: ""  # before 8.1
    assert "cann" not in describe_environment(on_it, "npu")


# The vendor's packages

RECORD = """\
../../../bin/torch_npu_run,sha256=of-this-machine,231
torch_npu-2.13.0.dist-info/INSTALLER,sha256=zuuue4,4
torch_npu-2.13.0.dist-info/RECORD,,
torch_npu/_C.so,sha256=CsK9HA,178729
torch_npu/__init__.py,sha256=wLHpGX,2617
torch_npu/__pycache__/__init__.cpython-311.pyc,,
"""


def test_a_vendors_package_is_told_with_the_hash_of_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of its installation: by the list of files of an installed torch_npu."""
    folder = tmp_path / "torch_npu-2.13.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (folder / "RECORD").write_text(RECORD)
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = describe_environment(subject("reference", "cpu"), "cpu")
    before = environment.package_sha256("torch-npu")
    assert {"numpy", "pytest", "hypothesis"} <= set(facts)
    assert (facts["torch-npu"], facts["sha256 of torch-npu"]) == ("2.13.0", before)
    assert len(before) == 64
    assert "sha256 of torch-mlu" not in facts
    lines = RECORD.replace("of-this-machine", "of-another").replace("zuuue4", "uv").splitlines()
    (folder / "RECORD").write_text("\n".join(reversed(lines)))
    assert environment.package_sha256("torch-npu") == before
    (folder / "RECORD").write_text(RECORD.replace("CsK9HA", "another"))
    assert environment.package_sha256("torch-npu") != before
    (folder / "RECORD").unlink()
    assert environment.package_sha256("torch-npu") == ""


def test_a_package_that_was_put_there_without_an_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch_mlu_ops")
    monkeypatch.setitem(sys.modules, "torch_mlu_ops", module)
    assert environment.package_versions(["torch-mlu-ops"]) == {}
    module.__version__ = "1.3.2"
    assert environment.package_versions(["torch-mlu-ops"]) == {"torch-mlu-ops": "1.3.2"}
    module.EMULATED = True  # a stand-in is not a package of the vendor's
    assert environment.package_versions(["torch-mlu-ops"]) == {}
