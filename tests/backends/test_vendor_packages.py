# SPDX-License-Identifier: Apache-2.0
"""`ascend`, `mlu` and `triton` name packages that are missing, broken or of another release, and a
run on the simulated device names a package that is not there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import run
from support.own_process import own_process

from portakv import AdaptiveConnector, BackendUnavailable, backends
from portakv.backends import ascend_kernel as _ascendc
from portakv.backends.ascend import CALLS, Ascend
from portakv.backends.base import Backend
from portakv.backends.mlu import Mlu
from portakv.backends.triton import Triton
from portakv_conformance.judge.subject import torch_name
from portakv_conformance.simdev import build
from portakv_conformance.vendor import ascend_ops

why_not = build.missing()
simulated = pytest.mark.skipif(why_not is not None, reason=why_not or "")
RELEASE = ".".join(torch.__version__.split(".")[:2])
#: By the type of device: the backend, its vendor's package, and what is to be installed.
VENDORS: dict[str, tuple[type[Backend], str, str]] = {
    "npu": (Ascend, "torch_npu",
            f"install torch_npu=={RELEASE}.* and CANN, and source CANN's set_env.sh"),
    "mlu": (Mlu, "torch_mlu_ops", "install torch_mlu and torch_mlu_ops of Cambricon Neuware"),
    "cuda": (Triton, "triton", ""),
    "cpu": (Triton, "triton", ""),
}  # fmt: skip
needs_a_child, without_the_package = own_process("mlu", "mlu without its package")
FIVE = "k, v, k_cache, v_cache, slot_mapping"
TRANSFER = (
    "key_value, kv_cache_ptrs, slot_mapping, paged_memory_device, page_buffer_size, direction, "
    "kv_format, block_size, head_size, skip_prefix_n_tokens"
)
BOTH_WAYS = f"__version__ = '1.4.0'\ndef reshape_paged_cache({FIVE}, direction=False): ..."


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Yield a function that returns a backend's decision if its vendor's package is a module of
    some text, or is not there."""
    monkeypatch.delenv(_ascendc.VARIABLE, raising=False)
    monkeypatch.setattr(_ascendc, "files", lambda package: tmp_path)  # whatever was built here
    packages = {"torch_npu", "torch_mlu_ops", "torch_mlu"}
    for name in (*packages, "triton", "portakv.backends._triton_kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(backends, "_triton_kernel", raising=False)
    without = [x for x in sys.path if not any(Path(x, name).exists() for name in packages)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without])

    def answer(kind: str, text: str | None, device: str = "") -> str:
        backend, package, _ = VENDORS[kind]
        if text is not None:
            (tmp_path / f"{package}.py").write_text(text)
        if kind == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        # torch knows the type only once its package was imported; `probe` reads the type alone.
        target: Any = torch.device(device) if device else SimpleNamespace(type=kind)
        return str(backend.probe(target))

    yield answer
    for name in packages:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["npu", "mlu"])
def test_others_are_refused_before_the_package_is_imported(
    kind: str, device: str, ask: Any
) -> None:
    answer = ask(kind, "raise SystemExit('imported')", device)
    assert answer.endswith(f": rejected, it runs on {kind} devices, not on {device}")


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("npu", None, "torch_npu is not installed; install"),
        ("mlu", None, "torch_mlu_ops is not installed; install"),
        ("npu", "import torch_npu_part", "torch_npu_part, which torch_npu needs, is not installed"),
        ("mlu", "import torch_mlu", "torch_mlu, which torch_mlu_ops needs, is not installed"),
        *((kind, f"raise {error}", f"{VENDORS[kind][1]} is installed, but its import failed {why}")
          for kind in ("npu", "mlu")
          for error, why in (
            ("ImportError('libx.so: cannot open')", "(ImportError: libx.so: cannot open); install"),
            ("OSError('libx.so: undefined symbol')", "(OSError: libx.so: undefined symbol)"),
            ("RuntimeError('CNRT error.')", "(RuntimeError: CNRT error)"),
            ("AttributeError('x')", "(AttributeError: x)"))),
        ("mlu", "def reshape(", "torch_mlu_ops is installed, but its import failed (SyntaxError: "),
        *((kind, f"raise {error}", why)
          for kind in ("cuda", "cpu")
          for error, why in (
            ("ModuleNotFoundError('x', name='triton')",
             "the package 'triton' is missing; pip install triton"),
            *((f"{error}('libtriton.so: foo\\nmore')",
               f"Triton cannot be imported: {error}: libtriton.so: foo")
              for error in ("ImportError", "OSError", "RuntimeError")))),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_or_broken_is_the_reason(
    kind: str, text: str | None, reason: str, ask: Any
) -> None:
    answer = ask(kind, text)
    assert answer.startswith(f"{VENDORS[kind][0].name}: rejected, {reason}")
    assert VENDORS[kind][2] in answer


# torch_mlu_ops


def another(has: str, version: str = "of unknown version") -> str:
    return (
        f"rejected, reshape_paged_cache is wanted of torch_mlu_ops {version}, which has {has}; "
        f"expected reshape_paged_cache({FIVE}, direction), or the same without direction: install "
        f"a release that has it"
    )


HAS = "accepted, torch_mlu_ops 1.4.0 has reshape_paged_cache ("


@pytest.mark.parametrize(
    ("package", "answer"),
    [
        ("__version__ = '0.1'", another("no such op", "0.1")),
        ("reshape_paged_cache = 7", another("no such op")),
        *((f"def reshape_paged_cache({has}): ...", another(f"reshape_paged_cache({names})"))
          for has, names in (
            ("key, value, cache", "key, value, cache"),
            (f"{FIVE}, direction, stream", f"{FIVE}, direction, stream"),
            ("*args, **kwargs", "args, kwargs"))),
        ("reshape_paged_cache = type", another("reshape_paged_cache(...)")),
        (f"__version__ = '1.4.0'\ndef reshape_paged_cache({FIVE}): ...",
         f"{HAS}to the cache only, since it has no direction) and no multi_layer_kv_transfer"),
        (BOTH_WAYS, f"{HAS}to and from the cache) and no multi_layer_kv_transfer"),
        (f"{BOTH_WAYS}\ndef multi_layer_kv_transfer({TRANSFER}): ...",
         f"{HAS}to and from the cache) and multi_layer_kv_transfer"),
        (f"{BOTH_WAYS}\ndef multi_layer_kv_transfer(key_value, slots): ...",
         f"{HAS}to and from the cache) and a multi_layer_kv_transfer(key_value, slots) that is not "
         "the known one and is not used"),
    ],
)  # fmt: skip
def test_what_it_says_of_a_torch_mlu_ops(package: str, answer: str, ask: Any) -> None:
    assert ask("mlu", package) == f"mlu: {answer}"


# torch_npu


@pytest.fixture
def loaded(ask: Any) -> Iterator[Callable[..., str]]:
    """Yield a function that returns the decision of `ascend` for a torch_npu of some version, with
    some schemas changed (empty: the op is missing)."""
    library = torch.library.Library("npu", "FRAGMENT")

    def answer(version: str = f"{RELEASE}.0", **changed: str) -> str:
        known = ascend_ops.pinned_schemas("vendor")
        for name, schema in ({x.partition("::")[2]: known[x] for x in known} | changed).items():
            if schema:
                library.define(name + schema)
        return str(ask("npu", f"__version__ = {version!r}"))

    yield answer
    library._destroy()
    for name in CALLS:  # which torch remembers
        torch.ops.npu.__dict__.pop(name, None)


NPU = f"{RELEASE}.0"
INSTALL = VENDORS["npu"][2]
#: Schemas of ops as other releases have them: an argument less, another name, an argument more.
OTHERS = {
    "npu_scatter_pa_kv_cache":  # releases before it had cache_mode
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping) -> ()",
    "npu_scatter_nd_update_": "(Tensor(a!) var, Tensor indices, Tensor updates) -> ()",
    "npu_gather_pa_kv_cache": "(Tensor key_cache, Tensor value_cache, Tensor block_tables, "
    "Tensor seq_lens, Tensor(a!) key, Tensor(b!) value, Tensor seq_offset) -> ()",
}


@pytest.mark.parametrize(
    ("version", "changed", "first", "last"),
    [
        *((x, {}, f"rejected, torch_npu {x} is installed, which is not for torch "
           f"{torch.__version__}; {INSTALL}", "") for x in ("2.1.0", "1.13.0", f"{RELEASE}1.0")),
        (f"{NPU}.post3", {}, f"accepted, torch_npu {NPU}.post3; copies go by its ops, since the "
         "AscendC kernel was not built (bash native/ascend/run_in_cann.sh npu builds it, and "
         "PORTAKV_ASCENDC names it)", ""),
        *((NPU, {x: ""}, f"rejected, torch_npu {NPU} has no op {x}; {INSTALL}", "")
          for x in sorted(CALLS)),
        *((NPU, {x: OTHERS[x]}, f"rejected, an op of torch_npu {NPU} is npu::{x}(",
           "cannot be called with") for x in OTHERS),
    ],
)  # fmt: skip
def test_what_it_says_of_a_torch_npu(
    version: str, changed: dict[str, str], first: str, last: str, loaded: Any
) -> None:
    answer = loaded(version, **changed)
    if last:
        assert answer.startswith(f"ascend: {first}")
        assert last in answer
    else:
        assert answer == f"ascend: {first}"


def test_a_kernel_that_is_named_and_cannot_be_used_is_a_rejection(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "libportakv_ascend.so"
    monkeypatch.setenv(_ascendc.VARIABLE, str(named))
    assert loaded() == (
        f"ascend: rejected, PORTAKV_ASCENDC names {named}, and there is no such file (bash "
        f"native/ascend/run_in_cann.sh npu builds it, and PORTAKV_ASCENDC names it); without "
        f"PORTAKV_ASCENDC the ops of torch_npu carry plans out"
    )


def test_what_is_called_is_what_is_pinned() -> None:
    assert {f"npu::{name}" for name in CALLS} == set(ascend_ops.pinned_schemas("vendor"))


# On the simulated device


@pytest.mark.parametrize(
    ("requested", "seen"),
    [("simdev:mlu", "mlu"), ("simdev:npu:1", "npu:1"), ("simdev", "simdev"),
     ("simdev:1", "simdev:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)  # fmt: skip
def test_the_name_behind_simdev_is_what_torch_gets_to_see(requested: str, seen: str) -> None:
    assert torch_name(requested) == seen


@without_the_package
@needs_a_child
@pytest.mark.full
def test_a_device_without_the_package_falls_to_reference_with_the_reason() -> None:
    layouts: dict[str, Any] = {"kv_layout": "mlu", "chunk_layout": "chunk-2ltd"}
    chosen = AdaptiveConnector("mlu", **layouts).explain()
    assert chosen.startswith("mlu:0: backend 'reference' was chosen\n")
    why = "torch_mlu_ops is not installed; install torch_mlu and"
    assert f"mlu: rejected, {why}" in chosen
    forced = f"Expected backend 'mlu', which is forced, to serve mlu:0, but it cannot: {why}"
    with pytest.raises(BackendUnavailable, match=f"^{re.escape(forced)}"):
        AdaptiveConnector("mlu", backend="mlu", **layouts)


@simulated
@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("simdev:npuu", 2, "got 'npuu'. Pass simdev, npu, mlu"),
        pytest.param("simdev:npu", 3, "it runs on mlu devices, not on npu", marks=pytest.mark.full),
    ],
)
def test_names_that_the_simulated_device_does_not_carry(
    device: str, code: int, message: str
) -> None:
    ran = run("conform", "mlu", "--device", device)
    assert (ran.code, message in ran.err) == (code, True), ran


@simulated
@pytest.mark.slow
def test_it_is_conformant_there_and_emulated(tmp_path: Path) -> None:
    words = "mlu", "--device", "simdev:mlu", "--profile", "full", "--report", str(tmp_path)
    ran = run("conform", *words)
    assert ran.code == 0, ran
    assert "emulated): conformant, R3." in " ".join(ran.out.split())
    record = json.loads((tmp_path / "conformance.json").read_text())
    assert record["environment"]["emulated"] is True
    assert record["environment"]["device"] == "simdev:mlu"
    assert record["environment"]["device_name"].startswith("simulated device (mlu")
    assert "torch_mlu_ops stand-in (emulated)" in record["trace"][0]
    assert "--device simdev:mlu" in record["command"]
