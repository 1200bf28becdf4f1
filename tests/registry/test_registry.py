# SPDX-License-Identifier: Apache-2.0
"""The registry chooses with its reasons on record, and the library keeps to every claim."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ready
from support.connector_cases import BLOCKS, DIM, HEADS, LAYERS, SIZE, caches, fresh, store
from support.guarded_memory import filled, refused, same
from support.small_backends import small_backend
from support.waits import LIMIT

from portakv import AdaptiveConnector, CopyPlan, KVView, register_backend
from portakv.backends.base import Backend
from portakv.errors import BackendUnavailable, Unsupported
from portakv.registry import registry

__all__ = ["caches", "fresh"]  # fixtures


def reasons(device: str = "cpu") -> dict[str, tuple[bool, str]]:
    return {d.name: (d.accepted, d.reason) for d in registry.trace(device)}


# Choosing


def test_environment_beats_argument_beats_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        register_backend(name, small_backend(name))
    assert registry.choose("cpu").name == "one"
    assert not registry.choose("cpu").forced
    assert registry.choose("cpu", "two").name == "two"
    monkeypatch.setenv("PORTAKV_BACKEND", "three")
    assert registry.choose("cpu", "two").name == "three"
    assert registry.choose("cpu").name == "three"
    assert registry.choose("cpu").forced
    monkeypatch.setenv("PORTAKV_BACKEND", "")
    assert registry.choose("cpu", "two").name == "two"
    monkeypatch.delenv("PORTAKV_BACKEND")
    assert registry.choose("cpu").name == "one"


@pytest.mark.parametrize("name", [*registry.MADE_FOR, registry.INTERPRETED])
def test_a_candidate_of_other_devices_is_not_imported(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry says what its probe says."""
    monkeypatch.delenv(registry.INTERPRET, raising=False)
    host = torch.device("cpu")
    asked = list[str]()

    class Watched(registry.Registry):
        def class_of(self, name: str) -> type[Backend]:
            asked.append(name)
            return super().class_of(name)

    own = Watched()
    answer = own.ask(name, host, check=True)
    assert not asked
    assert answer == (None, own.class_of(name).probe(host))
    own.ask("reference", host, check=False)  # the control
    assert asked == [name, "reference"]


def test_one_that_tells_no_formats_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of its device is moved before its format is checked."""
    broken: Any = small_backend("one")

    def hides(device: torch.device) -> None:
        raise RuntimeError(f"no format is known on {device}")

    broken.hides = staticmethod(hides)
    register_backend("one", broken)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
    with pytest.raises(RuntimeError, match="no format is known on cpu"):
        registry.REGISTRY.format_checks(torch.device("cpu"))


def test_unknown_forced_backend_lists_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend("one", small_backend("one"))
    with refused(
        BackendUnavailable, "'none'", "known are", "one, compiled", "let PortaKV"
    ) as caught:
        registry.choose("cpu", "none")
    decisions = [str(decision) for decision in caught.value.trace]
    relevant = [line for line in decisions if line.startswith(("none", "one", "ref"))]
    assert [line.partition(",")[0] for line in relevant] == [
        "none: rejected",
        "one: accepted",
        "reference: accepted",
    ]
    assert "portakv backends --device cpu" in str(caught.value)
    monkeypatch.setenv("PORTAKV_BACKEND", "none")
    with refused(BackendUnavailable, "'none'", "no such backend", "PORTAKV_BACKEND"):
        registry.choose("cpu", "one")


@pytest.mark.parametrize("device", [None, True, 2.5, ["cpu"], {}])
def test_what_is_no_device_is_refused(device: Any) -> None:
    expected = "not a device of torch; pass one such as 'cuda', 'cuda:0'", "Pass a device"
    with refused(BackendUnavailable, f"got {device!r}:", *expected) as caught:
        registry.choose(device)
    assert "\n" not in str(caught.value)


def test_a_name_asked_for_in_vain_can_be_registered_later_and_then_not_again() -> None:
    with pytest.raises(BackendUnavailable):
        registry.choose("cpu", "late")
    register_backend("late", small_backend("late"))
    for name in ("late", "reference"):
        with refused(BackendUnavailable, repr(name), "registered already", "another name"):
            register_backend(name, small_backend(name))
        assert registry.choose("cpu", name).name == name


def test_candidates_behind_the_winner_are_not_touched() -> None:
    first = small_backend("first")
    second = small_backend("second")
    register_backend("first", first)
    register_backend("second", second)
    assert registry.choose("cpu").name == "first"
    assert first.calls[0] == "probe"
    assert not second.calls


def test_the_self_check_runs_once_and_never_in_a_transfer(caches: list[torch.Tensor]) -> None:
    backend = small_backend("once")
    register_backend("once", backend)
    connector = AdaptiveConnector("cpu")
    launches = len(backend.launches)
    assert launches >= 2  # gather and scatter
    AdaptiveConnector("cpu")
    assert len(backend.launches) == launches
    chunk = filled((2, LAYERS, 2, HEADS * DIM), poison=True)
    connector.from_gpu(chunk, caches, [1, 2]).synchronize()
    assert len(backend.launches) == launches + 1


def test_a_self_check_waits_for_a_copy_of_another_thread_that_asks_the_registry() -> None:
    """As for the buffers of a stream, which a copy has while it prepares a stage."""
    begun = threading.Event()
    answered = threading.Event()

    def ask() -> None:
        begun.wait(LIMIT)
        registry.REGISTRY.names()
        registry.REGISTRY.ask("reference", torch.device("cpu"), check=True)
        answered.set()

    def check(_: KVView) -> None:
        begun.set()
        assert answered.wait(5.0), "the registry is locked"

    register_backend("slow", small_backend("slow", spoil=check))
    other = threading.Thread(target=ask)
    other.start()
    chosen = registry.choose("cpu", "slow")
    other.join()
    assert chosen.name == "slow"


def test_a_choice_that_is_made_while_backends_change_is_not_kept() -> None:
    def change(_: KVView) -> None:
        if "late" not in registry.REGISTRY.names():
            register_backend("late", small_backend("late"))

    register_backend("old", small_backend("old", spoil=change))
    assert registry.choose("cpu", "old").name == "old"
    assert (torch.device("cpu"), "old") not in registry.REGISTRY.choices


def test_nothing_is_imported_until_asked(tmp_path: Path) -> None:
    # In a separate process: other tests imported backends here long ago.
    (tmp_path / "vendor_stub.py").write_text("raise SystemError('imported too early')\n")
    add_entry_point(tmp_path, "stub", "vendor_stub:Backend")
    program = (
        "import sys, portakv\n"
        "portakv.register_backend('lazy', 'vendor_stub:Backend')\n"
        "assert 'vendor_stub' not in sys.modules\n"
        "assert 'portakv.backends.reference' not in sys.modules\n"
        "assert portakv.registry.registry.choose('cpu', 'reference').name == 'reference'\n"
        "assert 'vendor_stub' not in sys.modules\n"
        "print([str(d) for d in portakv.registry.registry.choose('cpu').trace])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ran = ready.run("-c", program, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "imported too early" in ran.stdout


# Entry points


def add_entry_point(folder: Path, name: str, target: str) -> None:
    info = folder / f"{name}_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[portakv.backends]\n{name} = {target}\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_vendor_sdk", "no_such_vendor_sdk"),
        ("raise OSError('libvendor.so is missing')", "libvendor.so is missing"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        ("Backend = 7", "a subclass of portakv.backends.base.Backend"),
        ("other = 7", "Backend"),
    ],
)
def test_a_broken_entry_point_is_reported_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    module = f"broken_vendor_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source + "\n")
    add_entry_point(tmp_path, "broken", f"{module}:Backend")
    add_entry_point(tmp_path, "sound", "small_backends_entry:Sound")
    (tmp_path / "small_backends_entry.py").write_text(
        "from support.small_backends import small_backend\nSound = small_backend('sound')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    # Installed packages do not become the CPU's default, sound or broken.
    assert registry.choose("cpu").name == "reference"
    assert registry.choose("cpu", "sound").name == "sound"
    accepted, why = reasons()["sound"]
    assert accepted
    assert "on cpu it is used only when named" in why
    accepted, why = reasons()["broken"]
    assert not accepted
    assert reason in why
    with refused(BackendUnavailable, "'broken'", reason) as caught:
        registry.choose("cpu", "broken")
    assert any(str(d).startswith("sound: accepted") for d in caught.value.trace)


def test_third_parties_come_before_what_runs_everywhere_on_other_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_entry_point(tmp_path, "vendor", "support.small_backends:Small")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_backend("local", small_backend("local"))
    for device, expected in (("npu_like", ["vendor", "local"]), ("cpu", ["local"])):
        order = registry.REGISTRY.automatic(type("Device", (), {"type": device})())
        assert [name for name in order if name in ("vendor", "local")] == expected
        assert order.index("local") < order.index("reference")
        assert order.index("triton") < order.index("local")


@pytest.mark.parametrize("target", [7, object, Backend, "no_colon", "a b:C", ":C", "pkg:", None])
def test_what_is_no_backend_or_no_name_is_refused_at_once(target: Any) -> None:
    with refused(BackendUnavailable, "'odd'", "class"):
        register_backend("odd", target)
    assert "odd" not in registry.REGISTRY.names()
    for name in ("", None, 3):
        with refused(BackendUnavailable, "not empty"):
            register_backend(name, "some.where:Class")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["odd", "reference", "", [], None])
def test_only_what_was_registered_is_unregistered(name: Any) -> None:
    with refused(BackendUnavailable, repr(name), "a registered backend", "was registered"):
        registry.REGISTRY.unregister(name)
    assert "reference" in registry.REGISTRY.names()


def test_logged_once(caplog: pytest.LogCaptureFixture, caches: list[torch.Tensor]) -> None:
    caplog.set_level("INFO", logger="portakv")
    register_backend("picky", small_backend("picky", rejects=no_layers))
    for _ in range(3):
        store(caches, [3, 1, 2])
        store(caches, [3, 1])
    messages = [record.getMessage() for record in caplog.records]
    assert [line for line in messages if "backend picky" in line] == [
        "cpu: backend picky, it is a test; self-check passed, every byte right"
    ]
    assert len([line for line in messages if "backend reference in place of picky" in line]) == 1


def test_entry_points_replace_no_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_point(tmp_path, "reference", "support.small_backends:Small")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(registry.choose("cpu", "reference").backend).__name__ == "Reference"
    answers = [str(d) for d in registry.trace("cpu") if d.name == "reference"]
    assert any("rejected" in answer and "replace" in answer for answer in answers)


# Self-check


def poison_one(view: KVView) -> None:
    view.plane(0, 0, torch.uint8).view(-1)[:1].bitwise_xor_(1)


def poison_unaddressed(view: KVView) -> None:
    if view.block_size:  # slot 1 is never addressed by the pattern
        view.plane(view.layers - 1, view.kv - 1, torch.uint8)[0, 1, 0, :1].bitwise_xor_(1)


def explode(view: KVView) -> None:
    raise ZeroDivisionError("a vendor's fault")


class Moody(small_backend("wrong")):  # type: ignore[misc]
    def capabilities(self) -> Any:
        raise RuntimeError("the driver is too old")


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (small_backend("wrong", spoil=poison_one), "1 of"),
        (small_backend("wrong", spoil=poison_unaddressed), "1 of"),
        (small_backend("wrong", spoil=explode), "ZeroDivisionError: a vendor's fault"),
        (Moody, "the driver is too old"),
    ],
)
def test_a_wrong_byte_or_an_error_in_the_self_check_rejects(
    caches: list[torch.Tensor], backend: Any, reason: str
) -> None:
    register_backend("wrong", backend)
    chunk, wanted = store(caches, [3, 1, 2])
    assert same(chunk, wanted)
    accepted, why = reasons()["wrong"]
    assert not accepted
    assert "self-check" in why
    assert reason in why
    with refused(
        BackendUnavailable, "'wrong', which is forced", "self-check", reason, watch=caches
    ):
        AdaptiveConnector("cpu", backend="wrong")


# Plans that a backend does not take


def no_layers(plan: CopyPlan) -> bool:
    """True for plans of more than the self-check's two layers."""
    return plan.src.layers > 2


def fails(plan: CopyPlan) -> bool:
    if no_layers(plan):
        raise RuntimeError("it dislikes this: invalid value for --gpu-architecture")
    return False


@pytest.mark.parametrize(
    ("how", "judge"), [("rejects", no_layers), ("refuses", no_layers), ("refuses", fails)]
)
def test_plans_not_taken_fall_back_aloud(caches: list[torch.Tensor], how: str, judge: Any) -> None:
    backend = small_backend("picky", **{how: judge})
    register_backend("picky", backend)
    connector = AdaptiveConnector("cpu")
    launches = len(backend.launches)
    chunk, wanted = store(caches, [3, 1, 2])
    assert same(chunk, wanted)
    assert len(backend.launches) == launches
    connector.register_kv_caches(caches)
    explanation = connector.explain()
    assert "picky: rejected" in explanation
    assert "dislikes" in explanation
    assert "reference" in explanation
    with refused(Unsupported, "'picky' was forced", "dislikes", watch=[*caches, chunk]):
        store(caches, [3, 1, 2], "picky")


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"alignment": 16}, "alignment"),
        ({"max_loops": 0}, "strided loops"),
        ({"tables": False}, "pointer tables"),
        ({"places": frozenset({("device", "device")})}, "pageable"),
    ],
)
def test_a_claim_that_a_plan_exceeds(claims: dict[str, Any], reason: str) -> None:
    # Widths of 6 bytes allow vectors of 2; three separate layers need a table.
    caches = [filled((2, BLOCKS, SIZE, HEADS, 3)) for _ in range(LAYERS)]
    chunk = filled((2, LAYERS, 3, HEADS * 3), poison=True)
    backend = small_backend("limited", **claims)
    register_backend("limited", backend)
    AdaptiveConnector("cpu").from_gpu(chunk, caches, [5, 0, 9]).synchronize()
    rows = torch.stack([c.view(2, -1, HEADS * 3)[:, [5, 0, 9]] for c in caches], dim=1)
    assert same(chunk, rows)
    assert all(launch.plan.src.layers == 2 for launch in backend.launches)  # the self-check's only
    chunk.fill_(0)
    with refused(Unsupported, "'limited' was forced", reason, watch=[*caches, chunk]):
        AdaptiveConnector("cpu", backend="limited").from_gpu(chunk, caches, [5, 0, 9])


@pytest.mark.parametrize("alignment", [8, 16])
def test_a_claim_that_a_plan_meets(caches: list[torch.Tensor], alignment: int) -> None:
    backend = small_backend("aligned", alignment=alignment)
    register_backend("aligned", backend)
    chunk, wanted = store(caches, [3, 1, 2], "aligned")
    assert same(chunk, wanted)
    assert backend.launches[-1].plan.vector >= alignment
