# SPDX-License-Identifier: Apache-2.0
"""The names of the quantization half load on first use, and packing without torch."""

import subprocess
import sys

import pytest
from tenfold_core import quant


def test_packing_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None
from tenfold_core.quant import pack_rows, unpack_rows
print(unpack_rows(pack_rows([[3, 0, 1, 2]], 2), 2, 4).tolist())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[[3, 0, 1, 2]]", found.stderr


def test_every_name_is_where_it_is_said_to_be():
    pytest.importorskip("torch")
    for name in quant.__all__:
        assert getattr(quant, name).__name__ == name


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = quant.nothing
