# SPDX-License-Identifier: Apache-2.0
"""What the ascend backend says of the torch_npu that it finds, or does not find."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import python

from portakv.backends import _ascend_kernel as _ascendc
from portakv.backends.ascend import CALLS, Ascend
from portakv.backends.base import Decision
from portakv_conformance.vendor import ascend_ops

RELEASE = ".".join(torch.__version__.split(".")[:2])
INSTALL = f"install torch_npu=={RELEASE}.* beside CANN, and source CANN's set_env.sh"
NPU: Any = SimpleNamespace(type="npu")  # torch knows the name only once torch_npu was imported


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs a torch_npu whose module is the given text, and asks the backend."""

    def ask(text: str, device: Any = NPU) -> Decision:
        folder = tmp_path / "torch_npu"
        folder.mkdir()
        (folder / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        return Ascend.probe(device)

    yield ask
    sys.modules.pop("torch_npu", None)


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library of the kernel, whatever was built here."""
    monkeypatch.delenv(_ascendc.VARIABLE, raising=False)
    monkeypatch.setattr(_ascendc, "_PLACE", ("lib", "none.so"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads a torch_npu of some version, with some schemas changed (empty: the op is missing), and
    asks the backend."""
    library = torch.library.Library("npu", "FRAGMENT")

    def ask(version: str = f"{RELEASE}.0", **changed: str) -> Decision:
        known = ascend_ops.pinned_schemas("vendor")
        for name, schema in ({x.partition("::")[2]: known[x] for x in known} | changed).items():
            if schema:
                library.define(name + schema)
        module = ModuleType("torch_npu")
        module.__dict__["__version__"] = version
        monkeypatch.setitem(sys.modules, "torch_npu", module)
        return Ascend.probe(NPU)

    yield ask
    library._destroy()
    for name in CALLS:  # which torch remembers
        torch.ops.npu.__dict__.pop(name, None)


def test_other_devices_are_refused_before_the_package_is_imported(installed: Any) -> None:
    decision = installed("raise SystemExit('imported')", torch.device("cpu"))
    assert str(decision) == "ascend: rejected, it runs on npu devices, not on cpu"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # as if it were nowhere
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "torch_npu").exists()])
    decision = Ascend.probe(NPU)
    assert str(decision) == f"ascend: rejected, torch_npu is not installed; {INSTALL}"


@pytest.mark.parametrize(
    ("text", "said"),
    [("raise ImportError('libhccl.so: cannot open')", "ImportError: libhccl.so: cannot open"),
     ("import torch_npu_no_such_part", "torch_npu_no_such_part")],
)  # fmt: skip
def test_a_broken_package_is_a_reason(installed: Any, text: str, said: str) -> None:
    """As of every vendor's: test_mlu.py has them all."""
    decision = installed(text)
    assert not decision.accepted
    assert said in decision.reason
    assert INSTALL in decision.reason


@pytest.mark.parametrize("version", ["2.1.0", "1.13.0", f"{RELEASE}1.0"])
def test_another_release_is_refused(loaded: Any, version: str) -> None:
    decision = loaded(version)
    assert str(decision) == (
        f"ascend: rejected, torch_npu {version} was found, which is not for torch "
        f"{torch.__version__}; {INSTALL}"
    )


def test_the_release_for_this_torch_is_accepted(loaded: Any) -> None:
    decision = loaded(f"{RELEASE}.0.post3")
    assert str(decision) == (
        f"ascend: accepted, torch_npu {RELEASE}.0.post3; copies go by its ops, since the AscendC "
        f"kernel was not built (bash native/ascend/run_in_cann.sh npu builds it, and "
        f"PORTAKV_ASCENDC names it)"
    )


def test_a_kernel_that_is_named_and_cannot_be_used_is_a_rejection(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "libportakv_ascend.so"
    monkeypatch.setenv(_ascendc.VARIABLE, str(named))
    decision = loaded()
    assert str(decision) == (
        f"ascend: rejected, PORTAKV_ASCENDC names {named}, and there is no such file (bash "
        f"native/ascend/run_in_cann.sh npu builds it, and PORTAKV_ASCENDC names it); without "
        f"PORTAKV_ASCENDC the ops of torch_npu carry plans out"
    )


@pytest.mark.parametrize("missing", sorted(CALLS))
def test_an_op_that_is_missing_is_named(loaded: Any, missing: str) -> None:
    assert str(loaded(**{missing: ""})) == (
        f"ascend: rejected, torch_npu {RELEASE}.0 has no op {missing}; {INSTALL}"
    )


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        (  # releases before it had cache_mode
            "npu_scatter_pa_kv_cache",
            "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
            "Tensor slot_mapping) -> ()",
        ),
        ("npu_scatter_nd_update_", "(Tensor(a!) var, Tensor indices, Tensor updates) -> ()"),
        (
            "npu_gather_pa_kv_cache",
            "(Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens, "
            "Tensor(a!) key, Tensor(b!) value, Tensor seq_offset) -> ()",
        ),
    ],
    ids=["an argument less", "another name", "an argument more"],
)
def test_an_op_with_another_signature_is_shown(loaded: Any, name: str, schema: str) -> None:
    decision = loaded(**{name: schema})
    assert not decision.accepted
    assert f"is npu::{name}(" in decision.reason
    assert "cannot be called with" in decision.reason


def test_what_is_called_is_what_is_pinned() -> None:
    pinned = ascend_ops.pinned_schemas("vendor")
    assert {f"npu::{name}" for name in CALLS} == set(pinned)


def test_portakv_works_beside_a_torch_npu_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so')")
    code = (
        "import sys, portakv, portakv.registry.registry as registry\n"
        "print(registry.choose('cpu').name, 'torch_npu' in sys.modules)\n"
        "print(*registry.trace('cpu'), sep='\\n')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    told = python("-c", code, PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert told.startswith("reference False\n")
    assert "ascend: rejected, it runs on npu devices, not on cpu" in told
