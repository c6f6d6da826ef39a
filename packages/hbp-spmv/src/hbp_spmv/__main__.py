# SPDX-License-Identifier: Apache-2.0
from hbp_spmv.cli import main

raise SystemExit(main())
