# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a benchmark go, and how an interrupted run finds them again.

=================  =====================  ====================  ===============
`out`              rows, as they come     record                at the end
=================  =====================  ====================  ===============
folder             folder/rows.jsonl      folder/run.json
results.jsonl      results.jsonl          results.run/run.json
results.csv        results.run/rows.jsonl results.run/run.json  results.csv
results.parquet    results.run/rows.jsonl results.run/run.json  results.parquet
=================  =====================  ====================  ===============

The record is written when the first rows are there, with a token of the settings and inputs, and
again at the end. Row orders, if they were timed, lie in reorder.jsonl beside the record.
"""

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tenfold_core.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from tenfold_core.run.atomic import atomic_path
from tenfold_core.run.checkpoint import require_token
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import JsonlStream, read_jsonl

from hbp_spmv.evaluate import COLUMNS, Row

__all__ = ["Output", "check_output", "read_rows", "write_rows"]

_TABLES = (".csv", ".parquet")
_CASE = ("matrix", "dtype", "threads", "cold")  # rows that are measured together
_ADDED = ("graph_us", "device")  # columns that older tables lack
_ORDERS = "reorder.jsonl"

Rows = list[dict[str, Any]]


def check_output(out: str | Path | None, plot: str | Path | None = None) -> None:
    """Refuse, before any work is done, an output that could not be written at the end.

    Raises:
        ConfigError: the suffix names no format, or the folder does not exist.
        MissingExtraError: Parquet or a plot is asked for and its library is not installed.
    """
    if out is not None and not Path(out).is_dir():
        suffix = Path(out).suffix.lower()
        if suffix not in (*_TABLES, ".jsonl", ""):
            raise ConfigError(f"{out}: expected a folder or a name in .jsonl, .csv or .parquet")
        _require_folder(out)
        if suffix == ".parquet" and importlib.util.find_spec("polars") is None:
            raise MissingExtraError(f"{out}: Parquet needs polars: pip install 'hbp-spmv[parquet]'")
        if suffix == "" and Path(out).exists():
            raise ConfigError(f"{out}: is a file, expected a folder or a name with a suffix")
    if plot is not None:
        _require_folder(plot)
        if Path(plot).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"{plot}: expected a name in .svg, .png or .pdf")
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingExtraError(f"{plot}: plots need Matplotlib: pip install 'hbp-spmv[plot]'")


def _require_folder(path: str | Path) -> None:
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{path}: the folder {Path(path).parent} does not exist; create it first")


class Output:
    """The files of one run; nothing is created before the first rows are written."""

    def __init__(
        self, out: str | Path, *, verb: str, settings: Mapping[str, Any], device: str = "cpu"
    ) -> None:
        """Say where to write; a name without a suffix is a folder.

        Args:
            out: folder or file name.
            verb: command that the record names.
            settings: the record's `config`; `token` is the fingerprint of settings and inputs,
                `matrices` their names, `protocol` holds the seed.
            device: name of the device that the record gives.
        """
        path = Path(out)
        suffix = "" if path.is_dir() else path.suffix.lower()
        self.table = path if suffix in _TABLES else None
        self.folder = path.with_suffix(".run") if suffix else path
        self.rows_path = path if suffix == ".jsonl" else self.folder / "rows.jsonl"
        self._verb, self._settings, self._device = verb, settings, device
        self._stream: JsonlStream | None = None
        self._record: RunRecord | None = None

    def resume(self, formats: Sequence[str]) -> tuple[Rows, Rows]:
        """Return the rows of an earlier run's complete cases, dropping others, and its row orders.

        Args:
            formats: formats of a case, all of which must have a row.

        Raises:
            CheckpointError: the earlier run had other settings or inputs, or has no record.
        """
        if not self.rows_path.exists():
            return [], []
        record_path = self.folder / "run.json"
        try:
            token = json.loads(record_path.read_text(encoding="utf-8"))["config"]["token"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{record_path}: cannot be read ({type(error).__name__}), expected the record of "
                f"the rows in {self.rows_path.name}; start again without --resume"
            ) from None
        require_token(record_path, token, self._settings["token"])
        rows = read_jsonl(self.rows_path)
        cases: dict[tuple[Any, ...], Rows] = {}
        for row in rows:
            cases.setdefault(tuple(row[name] for name in _CASE), []).append(row)
        complete = [case for case in cases.values() if [r["format"] for r in case] == [*formats]]
        kept = [row for case in complete for row in case]
        if len(kept) < len(rows):
            write_rows(self.rows_path, kept)
        orders = self.folder / _ORDERS
        self._open(resume=True)
        return kept, read_jsonl(orders) if orders.exists() else []

    def append(self, rows: Rows, orders: Rows) -> None:
        """Append rows, which are on the disk when this returns, and keep all row orders so far."""
        stream = self._stream or self._open(resume=False)
        if orders:
            _write_jsonl(self.folder / _ORDERS, orders)
        for row in rows:
            stream.append(row)

    def finish(
        self,
        rows: Rows,
        metrics: Mapping[str, tuple[float | None, str, Any]],
        notes: Sequence[str],
    ) -> None:
        """Write the table, if one was asked for, and complete the record."""
        if self._record is None:
            return
        if self.table is not None:
            write_rows(self.table, rows)
        for name, (value, unit, better) in metrics.items():
            self._record.metric(name, value, unit=unit, better=better)
        for text in notes:
            self._record.note(text)
        for path in (self.rows_path, self.folder / _ORDERS):
            if path.is_file() and path.parent == self.folder:
                self._record.artefact(path)

    def _open(self, *, resume: bool) -> JsonlStream:
        self._record = RunRecord(
            self.folder,
            package="hbp-spmv",
            command=["hbp-spmv", self._verb, *self._settings["matrices"]],
            config=self._settings,
            seed=self._settings["protocol"]["seed"],
            device=self._device,
        )
        if not resume:
            for path in (self.rows_path, self.folder / _ORDERS):
                path.unlink(missing_ok=True)
        self._record.write()
        self._stream = JsonlStream(self.rows_path, resume=resume)
        return self._stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._record is not None:
            self._record.finish(error)


def write_rows(path: str | Path, rows: Rows) -> None:
    """Write rows as .csv, .parquet or .jsonl, atomically; an absent value is empty or null."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        _write_jsonl(path, rows)
    elif suffix == ".csv":
        with (
            atomic_path(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([{name: row[name] for name in COLUMNS} for row in rows])
    else:
        import polars as pl

        kinds = {int: pl.Int64, float: pl.Float64, bool: pl.Boolean, str: pl.String}
        schema = {name: kinds[kind] for name, kind in _kinds().items()}
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        with atomic_path(path) as temporary:
            pl.DataFrame(columns, schema=schema, strict=False).write_parquet(temporary)


def read_rows(path: str | Path) -> Rows:
    """Read rows that :func:`write_rows` or a run has written, with their types.

    Columns that an older version did not write have their defaults.

    Raises:
        InputError: the file does not have the columns of a result.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = read_jsonl(path)
    elif suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = [dict(row) for row in csv.DictReader(file)]
    else:
        import polars as pl

        rows = pl.read_parquet(path).to_dicts()
    absent = {name: Row.__dataclass_fields__[name].default for name in _ADDED}
    if any(set(absent | row) != set(COLUMNS) for row in rows):
        raise InputError(f"{path}: expected the columns {', '.join(COLUMNS)}; measure again")
    if suffix == ".csv":
        kinds = _kinds()
        rows = [{name: _from_text(row[name], kinds[name]) for name in row} for row in rows]
    return [{name: (absent | row)[name] for name in COLUMNS} for row in rows]


def _kinds() -> dict[str, type]:
    """Return the type of each column, without the None that some may have."""
    kinds = {}
    for name in COLUMNS:
        hint = Row.__annotations__[name]
        kinds[name] = hint if isinstance(hint, type) else hint.__args__[0]
    return kinds


def _from_text(text: str, kind: type) -> Any:
    if text == "":
        return None
    return text == "True" if kind is bool else kind(text)


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, JsonlStream(temporary) as stream:
        for row in rows:
            stream.append(row)
