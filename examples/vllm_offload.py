# SPDX-License-Identifier: Apache-2.0
"""vLLM offloads KV blocks to host memory and takes them back, with PortaKV's worker.

    python examples/vllm_offload.py MODEL          # a model on a device, by vLLM's engine
    python examples/vllm_offload.py --fake-model   # vLLM's factory, manager and connector's calls

The configuration is all there is to it: two keys name the class and its module. With
``--fake-model`` no model and no accelerator are needed: caches of random bytes stand for a model's,
are stored, lost and loaded elsewhere, and every byte that comes back is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import Any

# a page: kv, tokens, heads, dim, bytes
LAYERS = 16
BLOCKS = 128
PAGE = 2 * 16 * 4 * 64 * 2
BLOCKS_PER_CHUNK = 4
CHUNKS = 16
CONFIGURATION = {
    "spec_name": "PortaKVOffloadingSpec",
    "spec_module_path": "portakv.integrations.vllm",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a byte, or a token, differs; 2 if vLLM is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a name or folder that vLLM takes")
    parser.add_argument("--fake-model", action="store_true", help="caches of random bytes")
    parser.add_argument("--device", default="cpu", help="of the fake model's caches")
    asked = parser.parse_args(arguments)
    if not asked.fake_model and not asked.model:
        parser.error("name a model, or pass --fake-model")
    try:
        import vllm.v1.kv_offload.base  # noqa: F401
    except ImportError as error:
        print(f"vLLM cannot be imported: {error}. See docs/plugs/vllm.md.", file=sys.stderr)
        return 2
    return fake(asked.device) if asked.fake_model else generate(asked.model)


def generate(model: str) -> int:
    """The same prompt twice; between the two vLLM forgets its own prefix cache."""
    from vllm import LLM, SamplingParams

    made = LLM(
        model,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": CONFIGURATION | {"cpu_bytes_to_use": 4 << 30},
        },
    )
    prompt = "The history of memory is long. " * 200
    greedy = SamplingParams(temperature=0)
    told = []
    for _ in range(2):
        began = time.perf_counter()
        told.append(made.generate([prompt], greedy)[0].outputs[0].token_ids)
        print(f"{len(told[-1])} tokens in {time.perf_counter() - began:.3f} s")
        made.reset_prefix_cache()
    print("the same tokens" if told[0] == told[1] else "TOKENS DIFFER")
    return int(told[0] != told[1])


def fake(device: str) -> int:
    """What the connector does for one request, by vLLM's own classes."""
    import torch
    from vllm.v1.kv_offload import base
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    before = torch.randint(-128, 128, (LAYERS, BLOCKS, PAGE), dtype=torch.int8, device="cpu")
    caches = [layer.to(device, copy=True) for layer in before]
    canonical = base.CanonicalKVCaches(
        [base.CanonicalKVCacheTensor(layer, PAGE) for layer in caches],
        [[base.CanonicalKVCacheRef(n, PAGE) for n in range(LAYERS)]],
    )
    spec = OffloadingSpecFactory.create_spec(offloading_config())
    manager = spec.get_manager()
    worker = spec.get_worker(canonical)
    request = base.ReqContext(req_id="request")
    manager.on_new_request(request)
    keys = [base.make_offload_key(bytes([n]) * 8, 0) for n in range(CHUNKS // 2)]
    went, came = torch.randperm(BLOCKS).reshape(2, -1)[:, : len(keys) * BLOCKS_PER_CHUNK].tolist()

    planned = manager.prepare_store(keys, request)
    worker.submit_store(1, gpu_blocks(went), planned.store_spec)
    tell("stored", done(worker, 1))
    manager.complete_store(keys, request)
    found = {manager.lookup(key, request).name for key in keys}
    for layer in caches:
        layer.zero_()
    worker.submit_load(2, manager.prepare_load(keys, request), gpu_blocks(came))
    tell("loaded", done(worker, 2))
    manager.complete_load(keys, request)

    same = all(torch.equal(x.cpu()[came], y[went]) for x, y in zip(caches, before, strict=True))
    worker.shutdown()
    print(f"{type(spec).__name__} on {device}, lookup says {', '.join(sorted(found))}")
    print("all bytes are the same" if same else "BYTES DIFFER")
    return int(not same)


def gpu_blocks(ids: list[int]) -> Any:
    """Blocks of one group, from the begin of a request on."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    return GPULoadStoreSpec(ids, group_sizes=[len(ids)], block_indices=[0])


def done(worker: Any, job: int) -> Any:
    worker.wait({job})
    return worker.get_finished()[0]


def tell(what: str, result: Any) -> None:
    print(f"{what} {result.transfer_size} bytes in {1e3 * result.transfer_time:.2f} ms")


def offloading_config() -> Any:
    """What vLLM's connector makes of its own configuration, for one worker."""
    from vllm.v1.kv_offload import config

    def known(kind: Any, **values: Any) -> Any:
        names = {field.name for field in fields(kind)}  # releases differ
        return kind(**{name: value for name, value in values.items() if name in names})

    names = ("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size", "data_parallel_size")
    group = known(
        config.OffloadingGroupConfig, tokens_per_block=16, layer_names=("fake",), group_id=0
    )
    return known(
        config.OffloadingConfig,
        groups=(group,),
        worker_kv_bytes_per_block=LAYERS * PAGE,
        enable_kv_cache_events=False,
        extra_config=CONFIGURATION
        | {"cpu_bytes_to_use": CHUNKS * BLOCKS_PER_CHUNK * LAYERS * PAGE},
        engine_id="fake",
        model=config.OffloadingModelConfig(name="fake", dtype="bfloat16"),
        cache=config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=BLOCKS_PER_CHUNK),
        parallel=known(
            config.OffloadingParallelConfig,
            rank=0,
            data_parallel_index=0,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
            **dict.fromkeys(names, 1),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
