# SPDX-License-Identifier: Apache-2.0
"""Engines above the range of an integration are served if they have the interfaces that it uses.

The sources of the engine are compared; the engine is not imported.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from support.command_line import run_json
from support.guarded_memory import check_sentence

from portakv.integrations import MATRIX, IntegrationError, check_release, untested, why_not
from portakv.integrations.interfaces import INTERFACES, Interface, differences


def write(folder: Path, interfaces: tuple[Interface, ...]) -> None:
    """Write an engine's package that has these interfaces, and cannot be imported."""
    modules: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for each in interfaces:
        holder, _, name = each.name.rpartition(".")
        takes = (*each.takes, *(f"{name}=None" for name in each.also))
        if name.isupper():
            modules[each.module][""].append(f"{name} = 1")
        elif each.abstract is not None:
            modules[each.module][name] += [
                "    @abstractmethod",
                "    def wait(self, job_ids): ...",
            ]
        elif not holder and name[0].isupper():
            modules[each.module][name] += [f"    {field}: object" for field in each.takes]
        elif holder:
            parameters = ", ".join(("self", *takes))
            modules[each.module][holder].append(f"    def {name}({parameters}): ...")
        else:
            parameters = ", ".join(takes)
            modules[each.module][""].append(f"def {name}({parameters}): ...")
    for module, classes in modules.items():
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / module.partition(".")[0] / "__init__.py").touch()  # before an installed one
        lines = ["raise RuntimeError('imported')", *classes.pop("", [])]
        for name, body in classes.items():
            lines += [f"class {name}:", *body]
        path.write_text("\n".join(lines))


@pytest.fixture(params=INTERFACES)
def integration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An integration whose engine is installed in a release above its range."""
    name = str(request.param)
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda x: "99.0" if x == MATRIX[name].package else real(x)
    )
    return name


def test_a_newer_release_with_the_same_interfaces_is_served_with_a_warning(
    integration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, INTERFACES[integration])
    monkeypatch.syspath_prepend(tmp_path)
    package = MATRIX[integration].package
    before = {*sys.modules}
    assert differences(integration) == []
    assert why_not(integration) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_release(integration)
    assert len(caught) == 1
    tested = MATRIX[integration].tested[0]
    check_sentence(str(caught[0].message), f"{package} 99.0", "look as expected", tested)
    assert untested(integration) == str(caught[0].message)
    (row,) = [each for each in run_json("doctor")["plugs"] if each["plug"] == integration]
    assert str(caught[0].message) in row["notes"]
    assert not any(f"{package} 99.0 is installed." in why for why in row["reasons"])
    assert {name for name in {*sys.modules} - before if name.partition(".")[0] == package} == set()


@pytest.mark.parametrize("change", ["gone", "another parameter", "a further parameter"])
def test_a_newer_release_with_other_interfaces_is_refused(
    integration: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the same release without the change is served."""
    first, *others = sorted(INTERFACES[integration], key=lambda each: -len(each.takes))
    changed = {
        "gone": first._replace(name=f"{first.name}_of_old"),
        "another parameter": first._replace(takes=("something", *first.takes[1:])),
        "a further parameter": first._replace(takes=(*first.takes, "something")),
    }
    write(tmp_path, (changed[change], *others))
    monkeypatch.syspath_prepend(tmp_path)
    place = f"{first.module}.{first.name}"
    reason = f"{place} is not there" if change == "gone" else f"{place} takes ("
    with pytest.raises(IntegrationError) as error:
        check_release(integration)
    check_sentence(
        str(error.value), reason, f"{MATRIX[integration].package} 99.0", str(MATRIX[integration])
    )
    write(tmp_path, INTERFACES[integration])
    assert why_not(integration) is None


def test_further_parameters_with_defaults_are_taken_where_the_integration_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, INTERFACES["sglang"])
    file = tmp_path / "sglang/srt/plugins/hook_registry.py"
    file.write_text(file.read_text().replace("hook_type)", "hook_type, *, source=None)"))
    monkeypatch.syspath_prepend(tmp_path)
    assert differences("sglang") == []
    file.write_text(file.read_text().replace("source=None", "source"))
    assert len(differences("sglang")) == 1


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("submit_load(self, job_id, src_spec, dst_spec", "{}, x=1", "submit_load takes"),
        ("    @abstractmethod\n", "    @abstractmethod\n    def x(self): ...\n", "methods: x"),
        ("num_segments=None", "segments=None", "SharedOffloadRegion.__init__ takes"),
        ("_REGION_SEGMENTS = 1", "", "_REGION_SEGMENTS is not there"),
    ],
)
def test_what_vllm_calls_and_what_it_is_called_with(
    old: str, new: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further parameter that the engine may pass, a further method, a keyword that is gone."""
    write(tmp_path, INTERFACES["vllm"])
    monkeypatch.syspath_prepend(tmp_path)
    assert differences("vllm") == []
    (file,) = [each for each in tmp_path.rglob("*.py") if old in each.read_text()]
    file.write_text(file.read_text().replace(old, new.format(old)))
    (result,) = differences("vllm")
    assert why in result
