# SPDX-License-Identifier: Apache-2.0
"""Time the hand-over between two servers of vLLM, and check its tokens.

    python -m portakv_benchmarks.engines.handover PREFILL DECODE --model NAME

PREFILL and DECODE are addresses such as http://localhost:8100, of servers that run as
docs/plugs/vllm_prefill_decode.md says. For each length, in turns: the decode engine computes a new
prompt, and another new prompt is computed by the prefill engine and pulled by the decode engine.
Each line is a JSON object: the median and the range of the seconds until the first token of the
decode engine, from the time at which it gets the request.

After that the tokens of other prompts are compared with those of the prefill engine alone, also of
a prompt that comes with the ticket of another one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import urllib.request
from typing import Any

ANSWER = 16  # tokens


class Server:
    """A server of vLLM.

    Args:
        address: such as http://localhost:8100.
        model: its name.
    """

    def __init__(self, address: str, model: str) -> None:
        self._address = address
        self._model = model

    def ask(self, prompt: list[int], tokens: int, params: dict[str, Any] | None = None) -> Any:
        """Return the answer to a prompt."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if params is not None:
            body["kv_transfer_params"] = params
        request = urllib.request.Request(
            f"{self._address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, prompt: list[int], params: dict[str, Any] | None = None) -> list[int]:
        """Return the tokens of an answer."""
        made: list[int] = self.ask(prompt, ANSWER, params)["choices"][0]["token_ids"]
        return made

    def counters(self) -> dict[str, float]:
        """Return the counters of the connector."""
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        made = dict[str, float]()
        for line in lines:
            if line.startswith("vllm:portakv_") and "hook" not in line:
                name, _, value = line.rpartition(" ")
                made[name.partition("{")[0]] = float(value)
        return made


def prompt_of(length: int, seed: int) -> list[int]:
    """Return a prompt that no other one begins like."""
    draw = random.Random(seed)
    return [draw.randrange(3, 4000) for _ in range(length)]


def prefilled(prefill: Server, prompt: list[int]) -> dict[str, Any]:
    """Return what a prompt's request carries on."""
    params: dict[str, Any] = prefill.ask(prompt, 1, {"do_remote_decode": True})[
        "kv_transfer_params"
    ]
    return params


def first_token(decode: Server, prompt: list[int], params: dict[str, Any] | None = None) -> float:
    """Return the seconds until the first token of an answer."""
    began = time.perf_counter()
    decode.ask(prompt, 1, params)
    return time.perf_counter() - began


def measure(prefill: Server, decode: Server, length: int, rounds: int, seed: int) -> dict[str, Any]:
    """Return the times of a length, in turns."""
    computed = list[float]()
    pulled = list[float]()
    for turn in range(rounds + 1):  # the first one connects, and does not count
        own = first_token(decode, prompt_of(length, seed + 2 * turn))
        prompt = prompt_of(length, seed + 2 * turn + 1)
        handed = first_token(decode, prompt, prefilled(prefill, prompt))
        if turn:
            computed.append(own)
            pulled.append(handed)
    return {
        "tokens": length,
        "computed": [statistics.median(computed), min(computed), max(computed)],
        "pulled": [statistics.median(pulled), min(pulled), max(pulled)],
    }


def check(prefill: Server, decode: Server, rounds: int, seed: int) -> dict[str, Any]:
    """Return how many of some answers are those of the prefill engine alone."""
    right = 0
    for turn in range(rounds):
        prompt = prompt_of(700 + 37 * turn, seed + turn)
        params = prefilled(prefill, prompt)
        handed = decode.tokens(prompt, params)
        other = decode.tokens([*prompt, 5], params)  # with the ticket of another prompt
        right += handed == prefill.tokens(prompt) and other == prefill.tokens([*prompt, 5])
    return {"answers": rounds, "right": right}


def main() -> None:
    """Measure, then check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prefill")
    parser.add_argument("decode")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    prefill = Server(args.prefill, args.model)
    decode = Server(args.decode, args.model)
    seed = time.time_ns()  # new prompts in each run
    for length in args.lengths:
        print(json.dumps(measure(prefill, decode, length, args.rounds, seed)), flush=True)
        seed += 1000
    print(json.dumps(check(prefill, decode, args.rounds, seed)))
    print(json.dumps({"prefill": prefill.counters(), "decode": decode.counters()}))


if __name__ == "__main__":
    main()
