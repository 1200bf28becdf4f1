# SPDX-License-Identifier: Apache-2.0
"""vLLM offloads KV blocks to host memory and loads them again, with PortaKV's worker.

    python examples/vllm_offload.py MODEL          # a model on a device, by vLLM's engine
    python examples/vllm_offload.py --fake-model   # vLLM's factory, manager and connector's calls

Only the configuration chooses PortaKV: two keys name the class and its module. With
``--fake-model`` the script needs no model and no accelerator. It stores caches of random bytes,
clears them, loads them into other blocks, and compares every loaded byte.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.config import OffloadingConfig

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
    """Return the exit code: 1 if a byte or a token differs, 2 if vLLM cannot be imported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a name or folder that vLLM takes")
    parser.add_argument("--fake-model", action="store_true", help="caches of random bytes")
    parser.add_argument("--device", default="cpu", help="of the fake model's caches")
    args = parser.parse_args(arguments)
    if not args.fake_model and not args.model:
        parser.error("name a model, or pass --fake-model")
    try:
        import vllm.v1.kv_offload.base  # noqa: F401
    except ImportError as error:
        print(f"vLLM cannot be imported: {error}. See docs/engines/vllm.md.", file=sys.stderr)
        return 2
    return fake(args.device) if args.fake_model else generate(args.model)


def generate(model: str) -> int:
    """Answer the same prompt twice; vLLM drops its own prefix cache in between."""
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
    answers = []
    for _ in range(2):
        began = time.perf_counter()
        answers.append(made.generate([prompt], greedy)[0].outputs[0].token_ids)
        print(f"{len(answers[-1])} tokens in {time.perf_counter() - began:.3f} s")
        made.reset_prefix_cache()
    print("the same tokens" if answers[0] == answers[1] else "TOKENS DIFFER")
    return int(answers[0] != answers[1])


def fake(device: str) -> int:
    """Do the connector's work for one request, by vLLM's own classes."""
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
    results = {manager.lookup(key, request).name for key in keys}
    for layer in caches:
        layer.zero_()
    worker.submit_load(2, manager.prepare_load(keys, request), gpu_blocks(came))
    tell("loaded", done(worker, 2))
    manager.complete_load(keys, request)

    same = all(torch.equal(x.cpu()[came], y[went]) for x, y in zip(caches, before, strict=True))
    worker.shutdown()
    print(f"{type(spec).__name__} on {device}, lookup reports {', '.join(sorted(results))}")
    print("all bytes are the same" if same else "BYTES DIFFER")
    return int(not same)


def gpu_blocks(ids: list[int]) -> GPULoadStoreSpec:
    """Return blocks of one group, from the beginning of a request."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    return GPULoadStoreSpec(ids, group_sizes=[len(ids)], block_indices=[0])


def done(worker: OffloadingWorker, job: int) -> TransferResult:
    """Wait for a job, and return its result."""
    worker.wait({job})
    return worker.get_finished()[0]


def tell(what: str, result: TransferResult) -> None:
    """Print the size and the time of a transfer."""
    print(f"{what} {result.transfer_size} bytes in {1e3 * result.transfer_time:.2f} ms")


def offloading_config() -> OffloadingConfig:
    """Return the configuration that vLLM's connector passes on, for one worker."""
    from vllm.v1.kv_offload import config

    def known(kind: type[Any], **values: object) -> Any:
        names = {field.name for field in fields(kind)}  # they differ from release to release
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
