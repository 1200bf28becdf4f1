# SPDX-License-Identifier: Apache-2.0
"""Put reports of certification runs among the committed results, then write the README's tables.

portakv conform reference --profile full --report out
python .ci/keep_result.py out/conformance.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import readme_tables
from portakv_conformance.report.results import keep


def main() -> None:
    """Keep each report named on the command line."""
    if len(sys.argv) < 2:
        sys.exit("Name the conformance.json of one report or several.")
    for report in sys.argv[1:]:
        try:
            file = keep(Path(report), readme_tables.RESULTS)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        print(f"{report} is kept as {file.relative_to(readme_tables.ROOT)}.")
    readme_tables.write()


if __name__ == "__main__":
    main()
