# SPDX-License-Identifier: Apache-2.0
"""Run the command line: `python -m mpq_dm`."""

from mpq_dm.cli import main

raise SystemExit(main())
