# SPDX-License-Identifier: Apache-2.0
"""Read a sparse matrix from the files and the objects that people have."""

from hbp_spmv.readers.dispatch import read, read_with_info
from hbp_spmv.readers.finish import ReadInfo

__all__ = ["ReadInfo", "read", "read_with_info"]
