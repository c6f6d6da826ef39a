# SPDX-License-Identifier: Apache-2.0
"""Reports: from the files that quantize and eval leave, in Markdown and HTML."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from mpq_dm import figures
from mpq_dm.cli_evidence import report
from mpq_dm.config import MPQDMConfig
from mpq_dm.images import save_png
from mpq_dm.report import evaluation_lines, size_rows, write_report
from tenfold_core.errors import InputError
from tenfold_core.run.cli import main as run_command
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import plain

KURTOSIS = [1.9, 2.4, 3.0, 4.5, 9.0, 12.0]
LAYERS = [
    {
        "layer": "conv_in", "role": "input", "shape": [8, 1, 3, 3], "act_bits": 8,
        "mean_bits": 8.0, "rows_by_bits": {"8": 8}, "kurtosis": KURTOSIS,
    },
    {
        "layer": "mid.conv1", "role": "body", "shape": [10, 8, 3, 3], "act_bits": 6,
        "mean_bits": 3.0, "rows_by_bits": {"2": 1, "3": 8, "4": 1}, "kurtosis": KURTOSIS,
        "error_uniform": 0.2, "error_kurtosis": 0.19, "error_exact": 0.15, "error_chosen": 0.19,
    },
]  # fmt: skip
SIZE = {"role": "input", "weights": 72, "bits": 8.0, "codes": 72, "scales": 32, "order": 0,
        "smooth": 2, "acts": 24, "bias": 32}  # fmt: skip
SIZES = {
    "layers": [
        SIZE, SIZE | {"role": "body", "weights": 720, "bits": 3.0, "codes": 270, "order": 20}
    ],
    "roles": [
        {"role": "input", "layers": 1, "weights": 72, "bits": 8.0, "bytes": 162},
        {"role": "body", "layers": 1, "weights": 720, "bits": 3.0, "bytes": 380},
    ],
    "other": 58, "weights": 800, "accounted": 600, "bits": 3.4545, "bits_per_weight": 6.0,
    "disk": None,
}  # fmt: skip
LOSSES = [
    {"trajectory": k, "task": 30.0 - k, "relation": 0.5, "grad_ratio": None if k % 10 else 1.2}
    for k in range(25)
]
SPREAD = {"mean": 2.0, "min": 1.5, "max": 2.5}
MEASURES = ("frechet", "frechet_equal", "frechet_infinity", "kid", "kid_error", "precision",
            "recall", "class_accuracy")  # fmt: skip
EVALUATION = {
    "paired": SPREAD | {"low": 1.9, "high": 2.1, "noises": 48},
    "original": dict.fromkeys(MEASURES, SPREAD),
    "quantized": dict.fromkeys(MEASURES, SPREAD),
    "real": dict.fromkeys(MEASURES, 0.25),
    "features": {"name": "a <classifier>", "accuracy": 0.98, "images": 80, "held_out": 20,
                 "equal": 10, "width": 64},
    "steps": [{"timestep": 999.0 - 333 * k, "error": SPREAD, "power": 4.0} for k in range(3)],
    "size": {"bits": 3.45, "bits_per_weight": 6.0, "bytes": 600, "original_bytes": 3200,
             "macs": 1e6, "bops": 2e7, "original_bops": 1.024e9},
    "seeds": [{"seed": 0, "noises": 24}, {"seed": 1, "noises": 24}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    content = {
        "config": plain(MPQDMConfig(weight_bits=3)), "timesteps": [999.0, 666.0, 333.0],
        "layers": LAYERS, "left": {"odd": "a class that is not known"}, "dead_channels": {},
        "losses": LOSSES, "sizes": SIZES, "seconds": 12.0, "notes": [],
    }  # fmt: skip
    (path / "report.json").write_text(json.dumps(content))
    with RunRecord(path, package="mpq-dm", command=["mpq-dm", "quantize"]):
        pass
    return path


@pytest.fixture
def evaluated(folder):
    import numpy as np

    (folder / "eval").mkdir()
    (folder / "eval" / "eval.json").write_text(json.dumps(EVALUATION))
    save_png(folder / "eval" / "grid.png", np.zeros((4, 4, 1), np.uint8))
    return folder


def main(*arguments):
    return run_command("mpq-dm", {"report": report}, ["report", *map(str, arguments)])


def test_markdown_has_every_number_and_its_figures(evaluated, capsys):
    assert main(evaluated) == 0
    assert capsys.readouterr().err.count("written: ") == 6
    text = (evaluated / "report.md").read_text()
    assert "| weight_bits | 3 | 2 |" in text
    assert (
        "| mid.conv1 | 2 | body | 10 x 8 x 3 x 3 | 3.00 | 1 of 2, 8 of 3, 1 of 4 | 6 | 2.40 | "
        "3.00 | 4.50 | 12.00 | 0.2 | 95.0 | 75.0 | 95.0 |"
    ) in text
    assert "| body | 1 | 720 | 3.000 | 270 | 32 | 20 | 2 | 24 | 32 | 380 |" in text
    assert "2 ± 2 (1.5 to 2.5) | 2 ± 2 (1.5 to 2.5) | 0.25 ± 0.25 |" in text
    assert "Paired error 2, 95 % interval 1.9 to 2.1 over 48 noises" in text
    assert "Left as it is: odd (a class that is not known)." in text
    assert "![samples](<eval/grid.png>)" in text
    for name in ("kurtosis", "bits", "errors", "training", "steps"):
        assert f"](report-{name}.svg)" in text
        ET.parse(evaluated / f"report-{name}.svg")


class Tags(HTMLParser):
    """Collects what an HTML file has, and what it loads from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [
            value for name, value in attrs if name in ("src", "href") and value[:5] != "data:"
        ]


def test_html_is_one_file_with_everything_in_it(evaluated, tmp_path):
    assert main(evaluated, "--html", "--out", tmp_path / "page.html", "--quiet") == 0
    text = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.tags.count("svg") == 5
    assert tags.tags.count("img") == 1
    assert tags.loaded == []
    assert "a &lt;classifier&gt;" in text
    assert "<?xml" not in text
    assert not list(evaluated.glob("*.html"))
    assert not list(tmp_path.glob("*.svg"))


def test_a_model_that_was_not_evaluated_has_a_report_as_well(folder):
    assert [path.name for path in write_report(folder)] == [
        "report-kurtosis.svg", "report-bits.svg", "report-errors.svg", "report-training.svg",
        "report.md",
    ]  # fmt: skip
    assert "Evaluation" not in (folder / "report.md").read_text()


def test_the_same_files_give_the_same_report(evaluated, tmp_path):
    first = write_report(evaluated, tmp_path / "report.html", html=True)[0].read_bytes()
    assert write_report(evaluated, tmp_path / "report.html", html=True)[0].read_bytes() == first


def test_an_evaluation_elsewhere_is_named(folder, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    write_report(folder, evaluation=tmp_path)
    assert "## Evaluation" in (folder / "report.md").read_text()


def test_models_without_training_or_mixed_layers(folder):
    content = json.loads((folder / "report.json").read_text())
    content |= {"losses": [], "layers": LAYERS[:1], "left": {}, "config": plain(MPQDMConfig())}
    (folder / "report.json").write_text(json.dumps(content))
    (folder / "run.json").unlink()
    names = [path.name for path in write_report(folder)]
    assert names == ["report-kurtosis.svg", "report-bits.svg", "report.md"]
    text = (folder / "report.md").read_text()
    assert "All settings are the defaults." in text
    assert "Remarks" not in text


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("report.json", None, "report.json: not readable as JSON"),
        ("report.json", "{", "report.json: not readable as JSON"),
        ("report.json", "[]", "no 'layers' in it"),
        ("report.json", '{"layers": []}', "KeyError 'config' in report.json"),
        ("run.json", "{}", "no 'schema' in it"),
        ("eval.json", "{}", "no 'paired' in it"),
        ("eval.json", '{"paired": 3}', "in report.json or eval.json"),
        ("eval.json", json.dumps(EVALUATION | {"steps": [{"timestep": 0}]}), "KeyError 'power'"),
    ],
)
def test_damaged_files_are_one_line_and_leave_nothing(name, content, text, folder, capsys):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    assert main(folder) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(folder.glob("report*.md"))
    assert not list(folder.glob("*.svg"))


def test_a_place_that_does_not_exist_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        write_report(folder, tmp_path / "missing" / "report.md")
    with pytest.raises(InputError, match="expected what mpq-dm eval wrote"):
        write_report(folder, evaluation=tmp_path)


def test_bytes_of_roles_and_the_rest_sum_up():
    rows = size_rows(SIZES)
    assert [row[0] for row in rows] == ["input", "body", "other", "all"]
    assert [row[-1] for row in rows] == ["162", "380", "58", "600"]
    assert rows[-1][4:-1] == ["342", "64", "20", "4", "48", "64"]


def test_an_evaluation_without_real_images_is_told_in_lines():
    bare = {name: EVALUATION[name] for name in ("paired", "steps", "size", "seeds")}
    lines = "\n".join(evaluation_lines(bare))
    assert "Frechet" not in lines
    assert "1.024e+09" in lines
    assert "bits per weight" in lines


def test_figures_draw_what_is_odd(tmp_path):
    constant = LAYERS[0] | {"kurtosis": [None, None, None, None, None, None]}
    flat = [{"trajectory": 0, "task": 0.0, "relation": 0.0, "grad_ratio": None}]
    nothing = {"mean": 0.0, "min": 0.0, "max": 0.0}
    figures.draw_kurtosis(tmp_path / "k.svg", [constant])
    figures.draw_kurtosis(tmp_path / "many.svg", [LAYERS[1]] * 150)
    figures.draw_bits(tmp_path / "b.svg", [LAYERS[1]] * 150)
    figures.draw_training(tmp_path / "t.svg", flat)
    figures.draw_steps(tmp_path / "s.svg", [{"timestep": 1.0, "error": nothing, "power": 0.0}])
    assert len(list(tmp_path.glob("*.svg"))) == 5
