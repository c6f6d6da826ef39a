# SPDX-License-Identifier: Apache-2.0
"""Run the command line: `python -m hbp_spmv`."""

from hbp_spmv.cli import main

raise SystemExit(main())
