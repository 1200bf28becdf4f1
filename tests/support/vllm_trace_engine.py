# SPDX-License-Identifier: Apache-2.0
"""The trace of the connector's hooks in a real vLLM engine on a CPU.

`python -m support.vllm_trace_engine FILE` records it anew, in the environment of the engine, with
``src`` and ``tests`` on the path; see `.ci/plugs`. Then `tests/integrations/test_vllm_trace.py`
judges it.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from support.vllm_cpu import BLOCK, LAYERS, Engine, import_engine, in_a_child, make_model, prompt
from support.vllm_trace import ENDED, RELEASED, Recorder, Trace, write_trace

BLOCKS = 22  # of the engine; one of them is never used
#: Without a disk, so that nothing depends on its pace.
STORE = {"host": 64 << 20, "staging": 64 << 20}
#: Prompts whose blocks have room next to each other.
FIRST = [prompt(200, 1), prompt(150, 2)]
THIRD = prompt(100, 3)
LATE = prompt(180, 4)
#: Prompts whose blocks have room, but not those of their answers: from the first token of the
#: answer on, and from the second one on.
CROWD = [prompt(160, 10 + number) for number in range(4)]
LATER_CROWD = [prompt(159, 20 + number) for number in range(4)]
COMMAND = "python -m support.vllm_trace_engine tests/integrations/vllm_trace.json"


def record(model: Path) -> Trace:
    """Return the trace of an engine in a child, which has imported the engine."""
    trace: Trace = in_a_child(lambda: run(model))
    return trace


def run(model: Path) -> Trace:
    """Return the trace of an engine in this process."""
    recorder = Recorder()
    connector: Any = importlib.import_module("portakv.integrations.vllm.connector")
    with recorder.recording(connector.PortaKVConnector):
        recorder.part("the start of an engine")
        engine = Engine(model, STORE, blocks=BLOCKS, max_model_len=512)
        serve(engine, recorder)
        recorder.part("the end of the engine")
        engine.llm.llm_engine.engine_core.shutdown()
        stored = connector.settings_of(engine.llm.llm_engine.vllm_config, caches_of(engine))
    about = {
        "about": "hooks of PortaKVConnector, and their answers, in a real engine on a CPU",
        "vllm-cpu": metadata.version("vllm-cpu"),
        "record again": COMMAND,
        "blocks": BLOCKS,
        "block_size": BLOCK,
        "stored_size": stored.block_size,
        "layers": LAYERS,
        "steps until saves are released": RELEASED,
        "steps until loads and saves end": ENDED,
    }
    return Trace(about, recorder.events)


def caches_of(engine: Engine) -> Any:
    """Return the configuration of an engine's caches."""
    return engine.scheduler.kv_cache_config


def serve(engine: Engine, recorder: Recorder) -> None:
    """Serve the requests of the trace."""
    recorder.part("prompts that no tier has, whose blocks are saved")
    engine.ask(FIRST, 4)
    engine.forget()

    recorder.part("two prompts that are loaded, and one that is computed meanwhile")
    engine.ask([*FIRST, THIRD], 4)
    engine.forget()

    recorder.part("a load that lacks a block, which is computed anew")
    recorder.lose(1)
    engine.ask(FIRST[:1], 4)
    engine.forget()

    recorder.part("a request that is aborted during its load")
    begin(engine, "loading", FIRST[0], 1)
    engine.llm.llm_engine.abort_request(["loading"])
    engine.forget()

    recorder.part("a request that is aborted while its blocks are read")
    begin(engine, "saving", LATE, 1)
    engine.llm.llm_engine.abort_request(["saving"])
    engine.forget()

    recorder.part("a request that is aborted before it is scheduled")
    begin(engine, "waiting", FIRST[0], 0)
    engine.llm.llm_engine.abort_request(["waiting"])

    recorder.part("an answer of one token")
    engine.ask([LATE], 1)
    engine.forget()

    recorder.part("too few blocks: a request is preempted while its blocks are read")
    engine.ask(CROWD, 4)
    engine.forget()

    recorder.part("too few blocks: a request is preempted after it has run")
    engine.ask(LATER_CROWD, 4)
    engine.forget()

    recorder.part("the connector forgets what was stored")
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    engine.ask(FIRST[:1], 2)
    engine.forget()


def begin(engine: Engine, name: str, tokens: list[int], steps: int) -> None:
    """Begin a request, and make some steps."""
    from vllm import SamplingParams

    terms = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    inner = engine.llm.llm_engine
    inner.add_request(name, {"prompt_token_ids": tokens}, terms)
    for _ in range(steps):
        inner.step()


def main() -> None:
    """Record the trace into a file."""
    import_engine()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        in_a_child(lambda: make_model(model))
        trace = record(model)
    write_trace(trace, Path(sys.argv[1]))
    print(f"{len(trace.events)} events")


if __name__ == "__main__":
    main()
