# SPDX-License-Identifier: Apache-2.0
"""Write constraints.txt anew: `pip install uv && python .ci/update_constraints.py`.

One resolution covers every supported Python, with a marker where an older one needs an older
release. It is done against the package index, so its torch is the CUDA build; the pins hold for
the CPU build as well, because a local version such as `2.13.0+cpu` satisfies `==2.13.0`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
CI_TOOLS = ("uv",)

# torch names the exact CUDA libraries that it needs; repeating them would only go stale. NVRTC
# stays, since the `cuda` extra asks for it too and must not pull in another release of it.
LEFT_TO_TORCH = re.compile(r"nvidia-(?!cuda-nvrtc\b)|cuda-toolkit\b")
OTHER_SYSTEMS = re.compile(r"== '(emscripten|win32)'")
PYTHON_MARKER = re.compile(r"python_full_version\s*(?:<=|>=|==|<|>)\s*'[\d.*]+'")

HEADER = f"""\
# Versions that PortaKV is tested with, for every extra: pip install -c constraints.txt ...
# Made by .ci/update_constraints.py. torch {TORCH} itself requires this triton and this NVRTC.
"""


def resolve() -> str:
    """Return uv's resolution of every extra for all supported Pythons, one pin a line."""
    command = [
        *("uv", "pip", "compile", "pyproject.toml", "-", "--all-extras", "--universal"),
        *("--python-version", "3.10", "--no-annotate", "--no-header", "--quiet"),
    ]
    wanted = "\n".join((f"torch=={TORCH}", *CI_TOOLS))
    done = subprocess.run(
        command, cwd=ROOT, input=wanted, text=True, stdout=subprocess.PIPE, check=True
    )
    return done.stdout


def pin(line: str) -> str | None:
    """Reduce one resolved line to a name, a number and a Python marker; None leaves it out."""
    requirement, _, marker = (part.strip() for part in line.partition(";"))
    if LEFT_TO_TORCH.match(requirement) or OTHER_SYSTEMS.search(marker):
        return None
    pythons = " and ".join(PYTHON_MARKER.findall(marker)).replace("'", '"')
    return f"{requirement} ; {pythons}" if pythons else requirement


def main() -> int:
    """Write the file and say how many pins it holds."""
    pins = [pinned for line in resolve().splitlines() if line.strip() and (pinned := pin(line))]
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(pins) + "\n")
    print(f"constraints.txt holds {len(pins)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
