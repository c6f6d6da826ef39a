# SPDX-License-Identifier: Apache-2.0
import io
import sys
import types

import pytest
from tenfold_core.errors import MissingExtraError
from tenfold_core.run import report

COLUMNS, ROWS = ["format", "us"], [["csr", 12.5], ["a|b[0]", 3]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    monkeypatch.setattr(report, "sys", types.SimpleNamespace(stderr=stream))
    return stream


def test_a_text_table_is_aligned():
    assert report.text_table(COLUMNS, ROWS) == "format    us\ncsr     12.5\na|b[0]     3"


def test_a_markdown_table_escapes_its_bars():
    assert report.markdown_table(COLUMNS, ROWS).splitlines() == [
        "| format | us |",
        "|---|--:|",
        "| csr | 12.5 |",
        "| a\\|b[0] | 3 |",
    ]


def test_a_pipe_gets_plain_text_on_stderr(capsys):
    report.print_table(COLUMNS, ROWS, title="Table A")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "Table A\nformat    us\ncsr     12.5\na|b[0]     3\n"
    report.print_table(COLUMNS, ROWS)
    assert capsys.readouterr().err.startswith("format")


def test_a_terminal_gets_a_frame_and_every_cell(terminal):
    report.print_table(COLUMNS, ROWS, title="Table A")
    shown = terminal.getvalue()
    assert all(text in shown for text in ("Table A", "┃", "csr", "12.5", "a|b[0]"))


def test_no_color_means_plain(terminal, monkeypatch):
    assert not report.is_plain()
    monkeypatch.setenv("NO_COLOR", "1")
    assert report.is_plain()


def test_progress_yields_every_item_with_or_without_a_bar(terminal):
    assert list(report.progress(range(3), description="work", total=3)) == [0, 1, 2]
    assert terminal.getvalue() != ""
    terminal.truncate(0)
    assert list(report.progress(range(3), description="work", quiet=True)) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_progress_is_silent_in_a_pipe(capsys):
    assert list(report.progress(iter("ab"), description="work")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_the_accents_are_colours_of_the_palette():
    assert {report.ACCENT, report.BASELINE} <= set(report.PALETTE.values())


@pytest.mark.parametrize("dark", [False, True])
def test_a_figure_is_the_same_file_each_time(tmp_path, dark):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "c.png"):
        with report.figure(tmp_path / name, dark=dark) as drawing:
            drawing.subplots().plot([1, 2], label="ours")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawing = report.figure(tmp_path / "a.svg")
    with pytest.raises(MissingExtraError, match="pip install matplotlib"), drawing:
        pass
