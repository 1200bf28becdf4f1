# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector: which requests share blocks, by their salts, adapters, images and weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.vllm_stub import configuration

from portakv.integrations.vllm.caches import (
    extra_of,
    is_served,
    parameters_for,
    remote_rows_of,
    salt_of,
    settings_of,
)
from portakv.serving import Group, SchedulerSide
from portakv.serving.handover import Identity
from portakv.serving.local import LocalIndex
from portakv.serving.plan import RemoteRows


def request(**terms: Any) -> Any:
    return SimpleNamespace(**{"cache_salt": None, "lora_request": None, "mm_features": [], **terms})


def test_salts_and_adapters_keep_blocks_apart() -> None:
    plain = salt_of(request())
    salted = salt_of(request(cache_salt="a"))
    adapted = salt_of(request(lora_request=SimpleNamespace(lora_name="a")))
    assert plain == b""
    assert len({plain, salted, adapted}) == 3


def test_a_salt_cannot_pass_for_an_adapter() -> None:
    """The parts of a salt are text, in which a request may write what separates them."""
    adapter = SimpleNamespace(lora_name="name", lora_path="path")
    adapted = salt_of(request(cache_salt="t", lora_request=adapter))
    assert salt_of(request(cache_salt="t\0name\0path\0")) != adapted
    other = SimpleNamespace(lora_name="name\0path", lora_path="")
    assert salt_of(request(cache_salt="t", lora_request=other)) != adapted


@pytest.mark.parametrize(
    "terms",
    [{"prompt_embeds": torch.zeros(1)}, {"mm_features": [object()]}, {"resumable": True}],
    ids=["embeddings", "images without a name", "sessions"],
)
def test_requests_of_more_than_tokens_are_left_to_the_engine(terms: dict[str, Any]) -> None:
    assert is_served(request())
    assert not is_served(request(**terms))


def test_rows_of_another_adapter_are_not_pulled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor those of an adapter that was trained further, or of the model without one."""
    weights = tmp_path / "adapter.safetensors"

    def adapted(name: str | None, content: bytes, **params: Any) -> tuple[Any, Any]:
        weights.write_bytes(content)
        lora = name and SimpleNamespace(lora_name=name, lora_path=str(tmp_path))
        terms = {"prompt_token_ids": [1, 2, 3], "request_id": "a", "kv_transfer_params": params}
        made = request(lora_request=lora, **terms)
        return made, Identity.of("model", made.prompt_token_ids, salt_of(made), ())

    rows = RemoteRows((b"ticket",), 3, 30.0)

    def pulled(name: str | None, content: bytes) -> RemoteRows | None:
        made, identity = adapted(name, content, **params)
        return remote_rows_of(made, lambda *_: identity)

    asked, identity = adapted("a", b"one")
    params = parameters_for(asked, rows, identity, "engine", 1)
    assert pulled("a", b"one") == rows
    assert not caplog.records
    for other in (("b", b"one"), ("a", b"two"), (None, b"one")):
        assert pulled(*other) is None
    assert "Expected a ticket for the same" in caplog.text


def image(name: str, offset: int, length: int) -> Any:
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=name, mm_position=place)


def test_images_are_part_of_the_keys_of_the_blocks_that_they_touch() -> None:
    """Tokens 10 - 39 of blocks of 16 are an image's placeholders, 40 - 41 those of another."""
    features = [image("a", 10, 30), image("b", 40, 2)]
    asked = request(mm_features=features)
    assert is_served(asked)
    extra = extra_of(asked, 16)
    assert sorted(extra) == [0, 1, 2]
    others = {
        "another image": [image("c", 10, 30), image("b", 40, 2)],
        "another place": [image("a", 9, 30), image("b", 40, 2)],
    }
    for features in others.values():
        changed = extra_of(request(mm_features=features), 16)
        assert all(changed[number] != extra[number] for number in (0, 1, 2))
    second = extra_of(request(mm_features=[image("a", 10, 30), image("c", 40, 2)]), 16)
    assert [second[number] == extra[number] for number in (0, 1, 2)] == [True, True, False]
    assert extra_of(request(), 16) == {}


def test_requests_with_other_images_have_other_keys() -> None:
    index = LocalIndex()
    scheduler_side = SchedulerSide(16, [Group(16)], 1, index)
    tokens = [7] * 48
    for name in ("a", "b"):
        asked = request(mm_features=[image(name, 20, 8)])
        scheduler_side.add(name, tokens, salt_of(asked), extra_of(asked, 16))
        scheduler_side.scheduled(name, 0, 48, ((1, 2, 3),), replaced=True)
    first, second = (job.keys for job in scheduler_side.plan().saves)
    # The first block, before the image, is saved once.
    assert len(first) == 3
    assert len(second) == 2
    assert not {*first} & {*second}


def test_an_adapter_that_is_trained_further_has_other_blocks(tmp_path: Path) -> None:
    weights = tmp_path / "adapter.safetensors"
    adapted = request(lora_request=SimpleNamespace(lora_name="a", lora_path=str(tmp_path)))
    weights.write_bytes(b"one")
    first = salt_of(adapted)
    assert salt_of(adapted) == first
    weights.write_bytes(b"other")
    second = salt_of(adapted)
    weights.write_bytes(b"one")
    assert second != first == salt_of(adapted)


def test_other_weights_under_a_models_name_have_other_blocks(tmp_path: Path) -> None:
    configurations = configuration(str(tmp_path / "store"), "engine", 8, 16)
    configurations[0].model_config.model = str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = settings_of(*configurations).model
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert settings_of(*configurations).model != first


def test_an_adapter_of_another_path_has_other_blocks() -> None:
    salts = {
        salt_of(request(lora_request=SimpleNamespace(lora_name="a", lora_path=path)))
        for path in ("/one", "/two")
    }
    assert len(salts) == 2
