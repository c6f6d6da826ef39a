# SPDX-License-Identifier: Apache-2.0
"""What a quantization did and what it cost, as Markdown with figures or as one HTML file.

Everything comes from what `quantize` and `eval` left on the disk: `report.json`, `run.json`,
`eval.json`. A document is a list of blocks that either form is written from.
"""

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError
from tenfold_core.run.atomic import atomic_path
from tenfold_core.run.cli import Positional, main
from tenfold_core.run.report import markdown_table, text_table
from tenfold_core.run.results import rewrite_tables

from mpq_dm.config import MPQDMConfig

__all__ = ["SIZE_COLUMNS", "evaluation_lines", "size_rows", "write_report"]

SIZE_COLUMNS = ("role", "layers", "weights", "bits", "codes", "scales", "order", "smooth",
                "activations", "bias", "bytes")  # fmt: skip
_PARTS = ("codes", "scales", "order", "smooth", "acts", "bias")
_EVALUATION = "eval.json"
_MEASURES = {
    "frechet": "Frechet distance, all images",
    "frechet_equal": "Frechet distance, equal number of images",
    "frechet_infinity": "Frechet distance, extrapolated to infinitely many",
    "kid": "kernel distance, its standard error",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 12px; margin: 1rem 0; display: block;
        overflow-x: auto; }
th, td { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { font-size: 13px; color: #444; }
figure svg { max-width: 100%; height: auto; } figure img { image-rendering: pixelated; }
"""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of a level, 1 for the title."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table, its first column on the left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure by the function that draws it into a file of SVG."""

    name: str
    draw: Callable[[Path], None]
    caption: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file that is there already."""

    path: Path
    caption: str


Block = Heading | Text | Table | Drawing | Picture


def write_report(
    folder: Path, out: Path | None = None, *, html: bool = False, evaluation: Path | None = None
) -> list[Path]:
    """Write the report of a quantized model and return the files written, the report last.

    Args:
        folder: what `quantize` wrote.
        out: file of the report; figures of Markdown lie beside it, `NAME-FIGURE.svg`.
        html: write one self-contained HTML file.
        evaluation: folder or file of `eval`; by default `eval.json` or `eval/eval.json` in
            `folder`, if there is one.

    Raises:
        InputError: a file is missing or damaged, or `out` cannot be written.
    """
    report = _read(folder / "report.json", "layers")
    run = _optional(folder / "run.json") or {}
    place = _find_evaluation(folder, evaluation)
    found = None if place is None else _read(place, "paired")
    out = out or folder / ("report.html" if html else "report.md")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist")
    try:
        blocks = list(_blocks(folder.resolve().name, report, run, found, place))
        drawn = _drawn(blocks)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder}: {type(error).__name__} {error} in report.json or eval.json, expected those "
            "that mpq-dm wrote"
        ) from error
    return (_write_html if html else _write_markdown)(blocks, drawn, out)


def evaluation_lines(found: Json) -> list[str]:
    """Return the result of an evaluation as lines of text."""
    table = _evaluation_table(found)
    return [text_table(table.columns, table.rows), "", *_paired_lines(found)]


def size_rows(sizes: Json) -> list[list[str]]:
    """Return the bytes of each role by kind, then those of everything else and the sums."""
    rows = []
    for role in sizes["roles"]:
        parts = [layer for layer in sizes["layers"] if layer["role"] == role["role"]]
        kinds = [sum(layer[kind] for layer in parts) for kind in _PARTS]
        rows.append(_size_row(role["role"], role["layers"], role["weights"], role["bits"], kinds))
    inside = sum(role["weights"] for role in sizes["roles"])
    left = sizes["weights"] - inside
    rows.append(["other", "", f"{left:,}", *[""] * 7, f"{sizes['other']:,}"])
    sums = [sum(layer[kind] for layer in sizes["layers"]) for kind in _PARTS]
    total = _size_row("all", len(sizes["layers"]), sizes["weights"], sizes["bits"], sums)
    return [*rows, [*total[:-1], f"{sizes['accounted']:,}"]]


def _size_row(name: str, layers: int, weights: int, bits: float, kinds: Sequence[int]) -> list[str]:
    numbers = [f"{kind:,}" for kind in (*kinds, sum(kinds))]
    return [name, str(layers), f"{weights:,}", f"{bits:.3f}", *numbers]


def _find_evaluation(folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        place = given / _EVALUATION if given.is_dir() else given
        if not place.is_file():
            raise InputError(f"{place}: no such file, expected what mpq-dm eval wrote")
        return place
    places = (folder / _EVALUATION, folder / "eval" / _EVALUATION)
    return next((place for place in places if place.is_file()), None)


def _read(path: Path, field: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict) or field not in found:
        raise InputError(f"{path}: no {field!r} in it, expected what mpq-dm wrote")
    return found


def _optional(path: Path) -> dict[str, Any] | None:
    return _read(path, "schema") if path.is_file() else None


def _blocks(
    name: str, report: Json, run: Json, found: Json | None, place: Path | None
) -> Iterator[Block]:
    config, sizes = report["config"], report["sizes"]
    yield Heading(f"Quantization of {name}", 1)
    yield Text(
        f"W{config['weight_bits']}A{config['act_bits']}, {len(report['timesteps'])} sampling "
        f"steps, {config['allocation']} allocation, {len(report['losses'])} trajectories of "
        f"fine-tuning: {sizes['accounted']:,} bytes, {sizes['bits_per_weight']:.3f} bits per "
        f"weight with everything included, in {report['seconds']:.0f} s."
    )
    yield from _settings(config, run)
    yield Heading("Sizes in bytes")
    yield Table(SIZE_COLUMNS, size_rows(sizes))
    if found is not None and place is not None:
        yield from _evaluation(found, place)
    yield from _layers(report)
    yield from _training(report["losses"])
    yield from _remarks(report)


def _settings(config: Json, run: Json) -> Iterator[Block]:
    yield Heading("Settings")
    defaults = {item.name: item.default for item in fields(MPQDMConfig)}
    changed = {name: value for name, value in config.items() if value != defaults.get(name)}
    if changed:
        rows = [[name, _cell(value), _cell(defaults.get(name))] for name, value in changed.items()]
        yield Table(("setting", "value", "default"), rows)
    else:
        yield Text("All settings are the defaults.")
    same = [f"{name} {_cell(value)}" for name, value in config.items() if name not in changed]
    if changed and same:
        yield Text(f"At their defaults: {', '.join(same)}.")
    if run:
        device, commit = run["device"], run["git"].get("commit")
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        source = f", commit {commit[:12]}" if commit else ""
        yield Text(
            f"mpq-dm {run['version']}{source}, {run['started'][:10]}, on {device['name']} "
            f"({device.get('model', 'unknown')}); {versions}."
        )


def _evaluation(found: Json, place: Path) -> Iterator[Block]:
    yield Heading("Evaluation")
    for line in _paired_lines(found):
        yield Text(line)
    yield _evaluation_table(found)
    pairs = place.parent / "grid.png"
    if pairs.is_file():
        yield Picture(pairs, "Samples of both models from the same noise.")
    if found["steps"]:
        yield Drawing(
            "steps",
            lambda path: _figures().draw_steps(path, found["steps"]),
            "Squared error of the prediction at each call along the original's trajectories, "
            "relative to the prediction's mean square; the band is the range of the seeds.",
        )


def _evaluation_table(found: Json) -> Table:
    size, rows = found["size"], []
    for name, label in _MEASURES.items():
        if name in found.get("original", {}):
            sides = [_spread(found, side, name) for side in ("original", "quantized")]
            # the distance of all images has none of real ones beside it: they are fewer
            floor = None if name == "frechet" else found["real"].get(name)
            error = _error(found["real"]["kid_error"]) if name == "kid" else ""
            rows.append([label, *sides, "" if floor is None else f"{floor:.4g}{error}"])
    rows += [
        ["bits per weight", "32", f"{size['bits_per_weight']:.3f}", ""],
        ["bytes", f"{size['original_bytes']:,}", f"{size['bytes']:,}", ""],
        ["bit operations per image", f"{size['original_bops']:.4g}", f"{size['bops']:.4g}", ""],
    ]
    return Table(("mean (range of the seeds)", "original", "quantized", "real, held out"), rows)


def _spread(found: Json, side: str, name: str) -> str:
    mean, least, most = (found[side][name][key] for key in ("mean", "min", "max"))
    error = _error(found[side]["kid_error"]["mean"]) if name == "kid" else ""
    return f"{mean:.4g}{error} ({least:.4g} to {most:.4g})"


def _error(standard_error: float) -> str:
    return f" ± {standard_error:.2g}"


def _paired_lines(found: Json) -> list[str]:
    paired, seeds = found["paired"], found["seeds"]
    lines = [
        f"Paired error {paired['mean']:.4g}, 95 % interval {paired['low']:.4g} to "
        f"{paired['high']:.4g} over {paired['noises']:,} noises, {paired['min']:.4g} to "
        f"{paired['max']:.4g} over {len(seeds)} seeds: mean squared difference of two samples "
        "from one noise."
    ]
    if "features" in found:
        about = found["features"]
        accuracy = about["accuracy"]
        judged = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} % on those held out"
        lines.append(
            f"Distances are those of {about['width']} features of: {about['name']}{judged}; "
            f"{about['images']:,} real images to compare with, {about['held_out']:,} held out, "
            f"{about['equal']:,} images at a time where their number is equal."
        )
    return lines


def _layers(report: Json) -> Iterator[Block]:
    layers = report["layers"]
    if not layers:
        return
    yield Heading("Layers")
    yield Drawing(
        "kurtosis",
        lambda path: _figures().draw_kurtosis(path, layers),
        "Kurtosis of the weights' rows: how heavy their outliers are. Left, how many layers have "
        "which median and 90 % quantile; right, layer by layer.",
    )
    yield Drawing(
        "bits", lambda path: _figures().draw_bits(path, layers), "Bits of each layer's rows."
    )
    if any(layer.get("error_uniform") for layer in layers):
        yield Drawing(
            "errors",
            lambda path: _figures().draw_errors(path, layers),
            "Error of each layer's output on the calibration inputs, before fine-tuning: by "
            "kurtosis, by exact allocation, and as chosen, relative to uniform bits.",
        )
    columns = ("layer", "#", "role", "shape", "bits", "rows by bits", "input bits", "kurtosis 10 %",
               "median", "90 %", "max", "error, uniform bits", "kurtosis [%]", "exact [%]",
               "chosen [%]")  # fmt: skip
    yield Table(columns, [_layer(number, row) for number, row in enumerate(layers, start=1)])


def _layer(number: int, row: Json) -> list[str]:
    kurtosis = row["kurtosis"]
    uniform = row.get("error_uniform")
    errors = [""] * 4
    if uniform is not None:
        ways = ("kurtosis", "exact", "chosen")
        ratios = [100 * row[f"error_{way}"] / uniform if uniform else 100.0 for way in ways]
        errors = [f"{uniform:.3g}", *[f"{ratio:.1f}" for ratio in ratios]]
    return [
        row["layer"],
        str(number),
        row["role"],
        " x ".join(str(size) for size in row["shape"]),
        f"{row['mean_bits']:.2f}",
        ", ".join(f"{count} of {bits}" for bits, count in row["rows_by_bits"].items()),
        str(row["act_bits"]),
        *["" if kurtosis[k] is None else f"{kurtosis[k]:.2f}" for k in (1, 2, 3, 5)],
        *errors,
    ]


def _training(losses: Sequence[Json]) -> Iterator[Block]:
    if losses:
        yield Heading("Fine-tuning")
        yield Drawing(
            "training",
            lambda path: _figures().draw_training(path, losses),
            "Losses of the trajectories, and the norm of the relation loss's gradient over the "
            "task loss's. Every trajectory starts from another noise.",
        )


def _remarks(report: Json) -> Iterator[Block]:
    dead = report.get("dead_channels") or {}
    lines = [f"Left as it is: {name} ({why})." for name, why in report["left"].items()]
    lines += [f"Input channels of {name} that are always zero: {n}." for name, n in dead.items()]
    lines += report.get("notes") or []
    if lines:
        yield Heading("Remarks")
    for line in lines:
        yield Text(line)


def _cell(value: Any) -> str:
    return "none" if value is None else str(value)


def _figures() -> Any:
    from mpq_dm import figures

    return figures


def _drawn(blocks: Sequence[Block]) -> dict[str, str]:
    """Return the SVG of every figure by its name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks:
            if isinstance(block, Drawing):
                path = Path(folder) / f"{block.name}.svg"
                block.draw(path)
                found[block.name] = path.read_text(encoding="utf-8")
    return found


def _write_markdown(blocks: Sequence[Block], drawn: Mapping[str, str], out: Path) -> list[Path]:
    written, parts = [], []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Text():
                parts.append(block.text)
            case Table():
                parts.append(markdown_table(block.columns, block.rows))
            case Drawing():
                path = out.with_name(f"{out.stem}-{block.name}.svg")
                written.append(_save(path, drawn[block.name]))
                parts.append(f"![{block.name}]({path.name})\n\n{block.caption}")
            case Picture():
                path = Path(os.path.relpath(block.path, out.absolute().parent))
                parts.append(f"![samples](<{path.as_posix()}>)\n\n{block.caption}")
    return [*written, _save(out, "\n\n".join(parts))]


def _write_html(blocks: Sequence[Block], drawn: Mapping[str, str], out: Path) -> list[Path]:
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html(block, drawn) for block in blocks)
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>"
    )
    return [_save(out, text)]


def _html(block: Block, drawn: Mapping[str, str]) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Table():
            head = "".join(f"<th>{escape(name)}</th>" for name in block.columns)
            rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in block.rows]
            body = "\n".join(f"<tr>{row}</tr>" for row in rows)
            return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
        case Drawing():
            svg = drawn[block.name]
            return _html_figure(svg[svg.index("<svg") :], block.caption)  # without its doctype
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            return _html_figure(f'<img alt="" src="data:image/png;base64,{data}">', block.caption)


def _html_figure(inside: str, caption: str) -> str:
    return f"<figure>\n{inside}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _save(path: Path, text: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _regenerate(folder: Positional[Path], *, check: bool = False) -> int:
    """Rewrite the tables of the package's README from its committed results.

    Args:
        folder: the package's folder.
        check: change nothing, exit with 1 if a table differs.
    """
    from mpq_dm.results import readme_table

    results = folder / "benchmarks" / "results"
    return rewrite_tables(folder, partial(readme_table, results), check=check)


if __name__ == "__main__":
    raise SystemExit(main("python -m mpq_dm.report", _regenerate, package="mpq-dm"))
