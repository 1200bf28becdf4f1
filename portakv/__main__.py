# SPDX-License-Identifier: Apache-2.0
"""``python -m portakv`` is the command ``portakv``."""

from __future__ import annotations

import sys

from portakv_command import main

if __name__ == "__main__":
    sys.exit(main())
