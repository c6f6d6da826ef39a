# SPDX-License-Identifier: Apache-2.0
"""``python -m tenfold_core``: print what the environment offers."""

import sys

from tenfold_core.device import report

if __name__ == "__main__":
    rows = report()
    width = max(len(name) for name, _ in rows)
    sys.stdout.writelines(f"{name:<{width}}  {text}\n" for name, text in rows)
