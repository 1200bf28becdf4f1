# SPDX-License-Identifier: Apache-2.0
"""Run the code cells of a notebook, one after the other, in one namespace: `FILE...`.

A notebook of this tree is stored without outputs, and needs no Jupyter to be checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run(path: Path) -> int:
    """Run the code cells of a notebook, and return their number.

    Raises the error of the first cell that fails; its traceback names the cell. Raises `ValueError`
    for a cell with outputs.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        if cell["outputs"] or cell["execution_count"] is not None:
            raise ValueError(f"Expected cell {count} of {path} without outputs. Clear them.")
        code = compile("".join(cell["source"]), f"{path.name}, cell {count}", "exec")
        exec(code, namespace)
    return count


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{run(Path(name))} cells of {name} ran")
