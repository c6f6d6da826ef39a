# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201  (progress is printed)
"""Options that several verbs of the command line share, and the line that shows progress."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.run.cli import option

__all__ = [
    "NO_CONDITIONS",
    "Conditions",
    "Count",
    "Device",
    "Folder",
    "Json",
    "Mode",
    "Model",
    "Quiet",
    "progress_line",
    "say",
]

Json = Annotated[bool, option(name="json", help="print one line of JSON instead of a table")]
Quiet = Annotated[bool, option(help="no progress on stderr")]
Folder = Annotated[Path, option("-o", metavar="DIR")]
Model = Annotated[str, option(metavar="MODEL")]
Device = Annotated[str, option(metavar="auto|cpu|cuda[:N]", help="where to compute")]
Mode = Annotated[str, option(metavar="int8|packed|dequant", help="how products are computed")]
Count = Annotated[int, option("-n", metavar="N")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What samples are conditioned on."""

    labels: str | None = None
    """Class labels to draw from, such as 0-9,12, or a file of one a line."""
    negative_label: int | None = None
    """The label that stands for no condition, for guidance of a denoiser without a pipeline."""
    prompts: Path | None = None
    """Text file of prompts to draw from, one a line."""
    embeddings: Path | None = None
    """Safetensors file of arguments to draw from, one entry per condition."""

    def read(self) -> Any:
        """Return the settings in the terms of `mpq_dm.quantizing`."""
        from mpq_dm.quantizing import Conditioning

        return Conditioning(**asdict(self))


NO_CONDITIONS = Conditions()


def say(text: str, quiet: bool) -> None:
    """Print a line on stderr unless `quiet`."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def progress_line() -> Callable[[str, int, int], None]:
    """Return what writes one changing line on a terminal, and a line now and then elsewhere."""
    from tenfold_core.run.report import is_plain

    plain, last = is_plain(), [""]

    def show(what: str, done: int, total: int) -> None:
        text = f"{what}: {done} of {total}"
        if not plain:
            print(f"\r\x1b[K{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done in (1, total) or done * 10 // total != (done - 1) * 10 // total:
            if text != last[0]:
                print(text, file=sys.stderr, flush=True)
            last[0] = text

    return show
