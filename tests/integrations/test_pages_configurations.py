# SPDX-License-Identifier: Apache-2.0
"""Each configuration of an engine that stands on a page, in an example or in deploy passes
`portakv doctor`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.command_line import run
from support.kv_transfer import right

ROOT = Path(__file__).parents[2]
#: The option of the doctor for a configuration, by a key that each of them has.
OPTIONS = {
    '"kv_connector"': "--kv-transfer-config",
    '"adapter_params"': "--l2-adapter",
    '"class_name": "PortaKVStorage"': "--hicache-config",
}
#: A part of a configuration that a page shows alone.
PART = '"kv_connector_extra_config": {"'
#: What examples write in place of a value, by the name.
NAMES: dict[str, Any] = {"str": str, "store": "kv", "hand_over": {}}
#: Values that are those of a large machine, by their keys, and the values of the test.
SMALL = {"host": 1 << 20, "cpu_bytes_to_use": 1 << 20, "capacity": 1 << 30, "staging": 1 << 20}


class Shown(NamedTuple):
    """A configuration on a page.

    Attributes:
        page: the page, from the root of the repository.
        option: the option of the doctor for it.
        config: the configuration.
    """

    page: str
    option: str
    config: dict[str, Any]


def shown() -> list[Shown]:
    """Return the configurations of all pages."""
    pages = [ROOT / "README.md"]
    for folder in ("docs", "examples", "deploy"):
        pages += (ROOT / folder).rglob("*")
    found = list[Shown]()
    for page in sorted(pages):
        if page.suffix not in (".md", ".py", ".json", ".sh", ".yaml", ".yml", ".ipynb"):
            continue
        text = page.read_text("utf-8")
        name = str(page.relative_to(ROOT))
        if page.suffix == ".py":
            found += [Shown(name, "--kv-transfer-config", config) for config in of_code(text)]
        else:
            found += [Shown(name, option, config) for option, config in of_text(text)]
    return found


def of_text(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each JSON object with a key of `OPTIONS`, the outermost ones, and its option."""
    decoder = json.JSONDecoder()
    past = 0
    for match in re.finditer(r"\{", text):
        if match.start() < past:
            continue
        try:
            config, past = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        found = text[match.start() : past]
        option = next((option for key, option in OPTIONS.items() if key in found), None)
        if option is not None:
            yield option, config
        elif text[: match.start()].endswith(PART.removesuffix('{"')):
            yield "--kv-transfer-config", right(**config)


def of_code(text: str) -> Iterator[dict[str, Any]]:
    """Yield each dictionary of an example that has a key kv_connector."""
    tree = ast.parse(text)
    names = dict(NAMES)
    for each in tree.body:
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            try:
                names[each.targets[0].id] = ast.literal_eval(each.value)
            except ValueError:
                continue
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if "kv_connector" in keys:
            expression = ast.Expression(node)
            names["role"] = names.get("role", "kv_both")
            yield eval(compile(expression, "example", "eval"), {}, names)


def for_this_machine(value: Any, at: Path) -> Any:
    """Return a configuration with folders and sizes that this machine has."""
    if isinstance(value, list):
        return [for_this_machine(each, at) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: for_this_machine(each, at) for name, each in value.items()}
    made |= {name: size for name, size in SMALL.items() if name in made}
    if isinstance(made.get("folder"), str):
        made["folder"] = str(at / made["folder"].strip("/").replace("/", "-"))
    if "bucket" in made:
        made |= {"bucket": f"file://{at / 'bucket'}", "bucket_options": {}}
    if "secret_file" in made:
        secret = at / "secret"
        secret.write_bytes(bytes(range(32)))
        secret.chmod(0o600)
        made["secret_file"] = str(secret)
    return made


SHOWN = shown()


@pytest.mark.parametrize("each", SHOWN, ids=[f"{x.page}-{n}" for n, x in enumerate(SHOWN)])
def test_a_configuration_of_a_page_passes_the_doctor(each: Shown, tmp_path: Path) -> None:
    config = for_this_machine(each.config, tmp_path)
    ran = run("doctor", each.option, json.dumps(config))
    assert ran.code == 0, ran.out
    assert "error:" not in ran.out


def test_no_configuration_is_overlooked() -> None:
    """The pages that name a connector, and those with a configuration, are the same."""
    pages = {each.page for each in SHOWN}
    assert pages >= {
        "README.md",
        "deploy/kv-node.json",
        "deploy/kv.json",
        "docs/encodings.md",
        "docs/engines/lmcache.md",
        "docs/engines/sglang.md",
        "docs/engines/vllm.md",
        "examples/vllm_offload.py",
        "examples/vllm_prefill_decode.py",
        "examples/vllm_tiers.py",
    }
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text("utf-8")
        name = str(page.relative_to(ROOT))
        named = len(
            re.findall(r'"kv_connector": "', re.sub(r"```python.*?```", "", text, flags=re.S))
        )
        found = sum('"kv_connector": "' in json.dumps(x.config) for x in SHOWN if x.page == name)
        inner = sum(
            json.dumps(x.config).count('"kv_connector": "') for x in SHOWN if x.page == name
        )
        assert named <= max(found, inner), name


def test_a_configuration_of_another_package_is_not_checked() -> None:
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    ran = run("doctor", "--kv-transfer-config", json.dumps(config))
    assert ran.code == 0
    assert "not checked: The connector 'NixlConnector', in which PortaKV has no part." in ran.out
    assert "vLLM starts" not in ran.out
    for extra in (
        {},
        {"spec_name": "CPUOffloadingSpec"},
        {"spec_name": "S", "spec_module_path": "m"},
    ):
        config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
        config["kv_connector_extra_config"] = extra  # type: ignore[assignment]
        ran = run("doctor", "--kv-transfer-config", json.dumps(config))
        assert ran.code == 0
        assert "in which PortaKV has no part" in " ".join(ran.out.split())
    ran = run("doctor", "--kv-transfer-config", json.dumps({**config, "kv_rol": 1}))
    assert ran.code == 1


def worker(**extra: Any) -> dict[str, Any]:
    """Return the offloading worker's configuration of docs/engines/vllm.md, with some changes."""
    made = {
        "spec_name": "PortaKVOffloadingSpec",
        "spec_module_path": "portakv.integrations.vllm",
        "cpu_bytes_to_use": 1 << 20,
        **extra,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": made,
    }


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"spec_name": "PortaKVOfloadingSpec"}, "Expected spec_name"),
        (
            {"spec_module_path": "portakv.integrations.vllm_tier"},
            "'portakv.integrations.vllm', got",
        ),
        ({"cpu_bytes_to_use": -1}, "Expected cpu_bytes_to_use"),
        ({"cpu_bytes_to_use": 1 << 60}, "by cpu_bytes_to_use, and this machine has"),
        ({"portakv": {"gbps": 1}}, "expected a mapping with some of backend, max_gbps"),
        ({"portakv": {"max_gbps": 0}}, "max_gbps"),
        ({"portakv": {"overlap": "none"}}, "overlap"),
        ({"portakv": 5}, "expected a mapping"),
    ],
)
def test_the_terms_of_the_worker_are_checked(extra: dict[str, Any], says: str) -> None:
    ran = run("doctor", "--kv-transfer-config", json.dumps(worker(portakv={"overlap": "idle"})))
    assert ran.code == 0
    ran = run("doctor", "--kv-transfer-config", json.dumps(worker(**extra)))
    assert ran.code == 1
    assert says in " ".join(ran.out.split())


def several(*connectors: Any) -> dict[str, Any]:
    """Return a configuration of vLLM's connector that has others."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [*connectors]},
    }


def test_connectors_in_a_connector_are_checked(tmp_path: Path) -> None:
    nixl = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    good = right(folder=str(tmp_path / "kv"), host=1 << 20, staging=1 << 20, capacity=1 << 20)
    ran = run("doctor", "--kv-transfer-config", json.dumps(several(good, nixl)))
    assert ran.code == 0, ran.out
    said = " ".join(ran.out.split())
    assert "not checked: connectors[0]: The model" in said
    assert "not checked: connectors[1]: The connector 'NixlConnector'" in said

    wrong = right(folder="/proc/x", host=1 << 20, staging=1 << 20, capacity=1 << 20)
    ran = run("doctor", "--kv-transfer-config", json.dumps(several(nixl, wrong)))
    assert ran.code == 1
    assert "error: connectors[1]: kv_connector_extra_config: Expected a folder" in ran.out
    assert run("doctor", "--kv-transfer-config", json.dumps(several(good, good))).code == 1
    assert run("doctor", "--kv-transfer-config", json.dumps(several(good, 5))).code == 1
    without = {**several(), "kv_connector_extra_config": {}}
    assert run("doctor", "--kv-transfer-config", json.dumps(without)).code == 1
