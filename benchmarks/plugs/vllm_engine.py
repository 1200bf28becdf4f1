# SPDX-License-Identifier: Apache-2.0
"""A real vLLM engine with both offloading workers inside: vLLM's own and PortaKV's, in turns.

The engine serves prompts of random tokens with random weights. A prompt is computed and stored,
found in the device's prefix cache, and found in host memory after that cache was emptied. The
engine waits for the host time of each job that a worker begins. The tokens of both hits must be
equal. ``python -m portakv_benchmarks.plugs.vllm_engine SHAPE`` prints the rows of one page shape as
JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv.integrations import check_release
from portakv_benchmarks.plugs.engine import BLOCK, SHAPES, PageShape
from portakv_benchmarks.plugs.suite import OURS, OWN, labels
from portakv_benchmarks.shared.harness import Row, Rows, having, short

check_release("vllm")

from vllm.v1.kv_offload.base import OffloadingWorker  # noqa: E402
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec  # noqa: E402

from portakv.integrations.vllm.offloading import PortaKVOffloadingSpec  # noqa: E402

#: Tokens of a prompt: a few blocks, and a long one. The last tokens fill no block.
PROMPTS = (103, 4103)
ROUNDS = 8
#: Host memory of each worker.
HOST_BYTES = 6 << 30
#: Environment of the engine: one process, no network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Turns(OffloadingWorker):  # type: ignore[misc]
    """Both workers over the caches of one engine; the one whose turn it is begins the jobs.

    Attributes:
        turn: the name of that worker.
        seconds: the host's time of each job, by worker, direction and number of blocks.
    """

    made: Turns  # the worker of this process's engine

    def __init__(self, workers: dict[str, OffloadingWorker]) -> None:
        self._workers = workers
        self.turn = OWN
        self.seconds: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        Turns.made = self

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._timed("d2h", len(src_spec.block_ids), job_id, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._timed("h2d", len(dst_spec.block_ids), job_id, src_spec, dst_spec)

    def get_finished(self) -> list[Any]:
        return [each for worker in self._workers.values() for each in worker.get_finished()]

    def wait(self, job_ids: set[int]) -> None:
        for worker in self._workers.values():
            worker.wait(job_ids)

    def shutdown(self) -> None:
        for worker in self._workers.values():
            worker.shutdown()

    def _timed(self, op: str, blocks: int, *job: Any) -> bool:
        worker = self._workers[self.turn]
        submit = worker.submit_store if op == "d2h" else worker.submit_load
        began = perf_counter()
        begun: bool = submit(*job)
        self.seconds[self.turn, op, blocks].append(perf_counter() - began)
        return begun


class TurnsSpec(PortaKVOffloadingSpec):
    """vLLM's tier of host memory with both workers. One scheduler keeps its index."""

    def create_worker(self, kv_caches: Any) -> OffloadingWorker:
        own = CPUOffloadingSpec.create_worker(self, kv_caches)
        return Turns({OWN: own, OURS: super().create_worker(kv_caches)})


class Engine:
    """A vLLM engine of one page shape, with both workers."""

    def __init__(self, shape: PageShape, folder: Path) -> None:
        os.environ.update(ENVIRONMENT)
        if shape.together:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm import LLM
        from vllm.config import KVTransferConfig

        (folder / "config.json").write_text(json.dumps(_model(shape)))
        tier = KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": TurnsSpec.__name__,
                "spec_module_path": "portakv_benchmarks.plugs.vllm_engine",
                "cpu_bytes_to_use": HOST_BYTES,
            },
        )
        self._llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            block_size=BLOCK,
            max_model_len=8192,
            num_gpu_blocks_override=2600,
            gpu_memory_utilization=0.5,
            generation_config="vllm",
            seed=0,
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8],
            },
            kv_transfer_config=tier,
        )
        self._randomize()

    def _randomize(self) -> None:
        """Draw weights for which attention looks at the whole prefix."""
        core = self._llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.model
        drawn = torch.Generator(device="cuda").manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.fill_(1)
                else:
                    deviation = 1.0 if "embed" in name else 0.03 if "qkv" in name else 0.02
                    weight.normal_(0, deviation, generator=drawn)

    def generate(self, ids: Sequence[int], tokens: int = 8) -> tuple[float, int, list[int]]:
        """Return the milliseconds, the tokens that a cache had, and the generated tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = perf_counter()
        (answer,) = self._llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        took = 1e3 * (perf_counter() - began)
        return took, answer.num_cached_tokens, list(answer.outputs[0].token_ids)

    def forget(self) -> None:
        """Let the stores end, and empty the prefix cache of the device."""
        torch.cuda.synchronize()
        for _ in range(3):
            self.generate([11, 12, 13], tokens=1)
        self._llm.reset_prefix_cache()


def _model(shape: PageShape) -> Row:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32 if shape.heads == 8 else 4,
        "num_key_value_heads": shape.heads,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


class Served(NamedTuple):
    """A prompt that was computed, found on the device and found on the host; in milliseconds."""

    cold: float
    device_hit: float
    host_hit: float
    right: bool  # all of its blocks were found, and both hits gave the same tokens


def serve(engine: Engine, ids: Sequence[int]) -> Served:
    """Serve a new prompt three times, with the worker whose turn it is."""
    cold, _, _ = engine.generate(ids)
    device_hit, _, expected = engine.generate(ids)
    engine.forget()
    host_hit, cached, tokens = engine.generate(ids)
    engine.forget()
    right = cached == len(ids) // BLOCK * BLOCK and tokens == expected
    return Served(cold, device_hit, host_hit, right)


def measure(engine: Engine, shape: PageShape) -> Rows:
    """Return the rows of both workers: the host's time of jobs, and the time of prompts."""
    jobs = Turns.made
    drawn = torch.Generator().manual_seed(1)
    served: defaultdict[tuple[str, int], list[Served]] = defaultdict(list)
    for round_, length in product(range(ROUNDS + 1), PROMPTS):
        if (round_, length) == (1, PROMPTS[0]):  # the first round warmed up
            first = {key: max(each) for key, each in jobs.seconds.items()}
            jobs.seconds.clear()
            served.clear()
        for turn in (OWN, OURS) if round_ % 2 else (OURS, OWN):
            jobs.turn = turn
            ids = torch.randint(10, 31990, (length,), generator=drawn).tolist()
            served[turn, length].append(serve(engine, ids))
    right = {
        name: all(each.right for length in PROMPTS for each in served[name, length])
        for name in (OWN, OURS)
    }
    return _of_jobs(shape, first, right) + _of_prompts(shape, served)


def _of_jobs(
    shape: PageShape, first: dict[tuple[str, str, int], float], right: dict[str, bool]
) -> Rows:
    """Return a row for each kind of job and worker; ``first_us`` is the longest of the warm-up."""
    rows: Rows = []
    for (name, op, blocks), seconds in sorted(Turns.made.seconds.items()):
        row = {
            "kind": "plug_job",
            "shape": f"engine's job, {blocks} blocks, {shape.pages}",
            "row_bytes": shape.page,
            "blocks": blocks,
            "payload_bytes": blocks * shape.page * shape.tensors,
            **labels(name, op, "vllm"),
            "host_us": short(1e6 * median(seconds)),
            "least_us": short(1e6 * min(seconds)),
            "first_us": short(1e6 * first.get((name, op, blocks), 0)),
            "rounds": len(seconds),
            "verified": right[name],
        }
        rows.append(row)
    for row in having(rows, backend=OURS):
        for own in having(rows, backend=OWN, op=row["op"], blocks=row["blocks"]):
            row["host_of_own"] = short(row["host_us"] / own["host_us"])
            row["least_of_own"] = short(row["least_us"] / own["least_us"])
    return rows


def _of_prompts(shape: PageShape, served: dict[tuple[str, int], list[Served]]) -> Rows:
    """Return a row for each part of a kind of prompt and each worker."""
    rows: Rows = []
    for (name, length), prompts in sorted(served.items()):
        for part in ("cold", "device_hit", "host_hit"):
            took = [getattr(each, part) for each in prompts]
            row = {
                "kind": "plug_prompt",
                "shape": f"prompt of {length} tokens, {shape.pages}",
                "row_bytes": shape.page,
                **labels(name, part.replace("_", " "), "vllm"),
                "p50_ms": short(median(took)),
                "least_ms": short(min(took)),
                "most_ms": short(max(took)),
                "rounds": len(took),
                "verified": all(each.right for each in prompts),
            }
            rows.append(row)
    return rows


def main() -> None:
    """Run the engine of the page shape that the command names, and print its rows."""
    shape = SHAPES[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Engine(shape, Path(folder)), shape)
    print(json.dumps(rows), flush=True)
    os._exit(0)  # an engine in this process ends slowly


if __name__ == "__main__":
    # The engine imports this module by its name; `Turns` must be the same class there and here.
    from portakv_benchmarks.plugs import vllm_engine

    vllm_engine.main()
