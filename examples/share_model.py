# SPDX-License-Identifier: Apache-2.0
"""A second process computes with a model's memory, without a copy.

    python examples/share_model.py [device]     # extra migrate

A server builds a model, shares its memory and prints the bytes that describe it. A client builds
the same model on the ``meta`` device, which has no memory, and opens the server's memory with these
bytes. Both give the same result. The server then changes a weight, which the client sees.

The client's part is `client`, the server's is `serve`. Anything carries the bytes between them: a
pipe here, a socket or a file elsewhere. They are as secret as the model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import IO

import torch
from torch import nn

from portakv.errors import PortaKVError
from portakv.weights import open_model, share_model


class Model(nn.Module):
    """A small language model, whose head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 256, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.125))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(self.embed(tokens))) * self.scale
        return logits


@torch.no_grad()
def answer(model: Model) -> list[int]:
    """Return the most probable next token after each of some tokens."""
    device = model.head.weight.device
    tokens = torch.tensor([*b"one model, two processes"], dtype=torch.int64, device=device)
    next_tokens: list[int] = model(tokens).argmax(-1).tolist()
    return next_tokens


def serve(device: str) -> None:
    """Run the server: share a model, and change it once a line arrives."""
    torch.manual_seed(0)
    model = Model().to(device)
    if device == "cpu":
        model.share_memory()  # device memory can be shared without this
    with closing(share_model(model)) as shared:
        print(shared.data.hex(), answer(model), sep="\n", flush=True)
        sys.stdin.readline()
        with torch.no_grad():
            model.embed.weight.neg_()
        print(answer(model), flush=True)  # which waits for the device
        sys.stdin.readline()  # the memory stays until the client has ended


def client(device: str, data: bytes) -> Model:
    """Return a model in the server's memory."""
    with torch.device("meta"):
        model = Model()
    return open_model(model, data, device)


@contextmanager
def server(device: str) -> Iterator[tuple[IO[str], IO[str]]]:
    """Run the server in a process; yield the pipes to it and from it."""
    command = [sys.executable, __file__, device, "--serve"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            yield process.stdin, process.stdout
        finally:
            process.kill()


def main(device: str = "cpu", tell: Callable[[str], None] = print) -> bool:
    """Use a server's model before and after a change; return True if both are the same here."""
    with server(device) as (to_server, from_server):
        data = bytes.fromhex(from_server.readline())
        expected = from_server.readline().strip()
        model = client(device, data)
        nbytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        tell(f"opened    {nbytes:,} bytes, described by {len(data):,}; none was copied")
        first = str(answer(model)) == expected
        tell(f"answer    {'the same' if first else 'NOT THE SAME'}")
        to_server.write("change it\n")
        to_server.flush()
        changed = from_server.readline().strip()
        second = str(answer(model)) == changed != expected
        tell(f"changed   {'the same again' if second else 'NOT THE SAME'}")
        return first and second


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if both processes give the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--serve", action="store_true", help="be the server")
    args = parser.parse_args(words)
    try:
        if args.serve:
            serve(args.device)
            return 0
        return 0 if main(args.device) else 1
    except PortaKVError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
