# SPDX-License-Identifier: Apache-2.0
"""What every run needs: records, seeds, timing, checkpoints, the command line and reports.

Names load with their module on first use, so that ``--help`` pays for none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold_core.run.checkpoint import (
        atomic_directory,
        atomic_path,
        load_tensors,
        read_header,
        save_tensors,
    )
    from tenfold_core.run.record import RunRecord, validate
    from tenfold_core.run.rows import JsonlStream, read_jsonl
    from tenfold_core.run.seeds import generator, torch_generator
    from tenfold_core.run.timing import Timing, measure, measure_many

_MODULE_OF = {
    "JsonlStream": "rows",
    "RunRecord": "record",
    "Timing": "timing",
    "atomic_directory": "checkpoint",
    "atomic_path": "checkpoint",
    "generator": "seeds",
    "load_tensors": "checkpoint",
    "measure": "timing",
    "measure_many": "timing",
    "read_header": "checkpoint",
    "read_jsonl": "rows",
    "save_tensors": "checkpoint",
    "torch_generator": "seeds",
    "validate": "record",
}

__all__ = [
    "JsonlStream",
    "RunRecord",
    "Timing",
    "atomic_directory",
    "atomic_path",
    "generator",
    "load_tensors",
    "measure",
    "measure_many",
    "read_header",
    "read_jsonl",
    "save_tensors",
    "torch_generator",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
