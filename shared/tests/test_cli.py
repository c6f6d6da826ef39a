# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from tenfold_core.errors import ConfigError, DivergedError, InputError, TenfoldWarning
from tenfold_core.run.cli import Command, Positional, _one_line, _without_debug, main, option


def say(*values):
    sys.stdout.write(" ".join(map(str, values)) + "\n")


Out = Annotated[Path | None, option("-o", help="where to write")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of a training."""

    rate: float = 0.1
    """Step size."""

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}, expected a positive one")


def bench(
    files: Positional[tuple[Path, ...]],
    *,
    repeats: int = 20,
    out: Out = None,
    hot: bool = True,
    tag: Annotated[str, "a note that is not ours"] = "",
):
    """Time the products of a matrix.

    Args:
        files: Matrices to read.
        repeats: How often.
    """
    say([str(file) for file in files], repeats, out, hot, tag)


def train(config: Config, *, seed: int = 0) -> int:
    """Train it."""
    say(config.rate, seed)
    return 1


def boom(kind: str):
    """Fail in a certain way."""
    raise {
        "input": InputError("a.mtx:3: found x,\nexpected y"),
        "diverged": DivergedError("loss is NaN"),
        "interrupt": KeyboardInterrupt(),
        "file": FileNotFoundError(2, "No such file or directory", "m.mtx"),
        "os": OSError("the disk is gone"),
        "memory": MemoryError(),
        "pipe": BrokenPipeError(),
        "bug": RuntimeError("a bug"),
        "exit": SystemExit(7),
    }[kind]


def warn():
    """Warn."""
    warnings.warn("values are\nNaN", TenfoldWarning, stacklevel=2)


VERBS = {
    "bench": bench,
    "train": train,
    "boom": boom,
    "warn": warn,
    "lazy": Command("json:dumps", "Imported when it runs."),
    "text": "textwrap:dedent",
    "gone": Command("no_such_module:f", "Never imported by --help."),
}


def run(*arguments, commands=VERBS, **options):
    return main("tool", commands, list(arguments), **options)


def test_arguments_become_options_and_positions(capsys):
    assert run("bench", "a", "b", "--repeats", "3", "-o", "c", "--no-hot", "--tag", "t") == 0
    assert capsys.readouterr().out == "['a', 'b'] 3 c False t\n"
    assert run("bench", "--out", "c") == 0
    assert capsys.readouterr().out == "[] 20 c True \n"


def test_a_config_is_flat_and_the_return_value_is_the_exit_code(capsys):
    assert run("train", "--rate", "0.5", "--seed", "4") == 1
    assert capsys.readouterr().out == "0.5 4\n"


def test_a_repeated_option_collects_a_value_each_time(capsys):
    def gather(*, tags: Annotated[tuple[str, ...], option("-t", name="tag", repeated=True)] = ()):
        """Gather tags."""
        say(tags)

    for arguments, expected in (
        ((), "()\n"),
        (("--tag", "a=1", "-t", "b"), "('a=1', 'b')\n"),
    ):
        assert run(*arguments, commands=gather) == 0
        assert capsys.readouterr().out == expected


def test_a_single_function_needs_no_verb(capsys):
    assert run("x.mtx", commands=bench) == 0
    assert capsys.readouterr().out == "['x.mtx'] 20 None True \n"


def test_verbs_by_name_are_imported_when_they_run(capsys):
    assert run("--help") == 0
    listing = capsys.readouterr().out
    assert "bench  Time the products of a matrix.\n" in listing
    assert "lazy   Imported when it runs.\n" in listing
    assert "text   Remove any common leading whitespace" in listing
    assert run("gone") == 1
    assert "no_such_module" in capsys.readouterr().err


def test_the_help_of_a_verb_names_its_options(capsys):
    assert run("bench", "--help") == 0
    shown = capsys.readouterr().out
    for text in ("Time the products", "Matrices to read.", "How often.", "-o", "where to write"):
        assert text in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected a command: bench, train"),
        (["bnch"], 2, "unknown command 'bnch'; did you mean 'bench'?"),
        (["xyzzy"], 2, "unknown command 'xyzzy'; expected one of bench, train"),
        (["bench", "--repeats", "x"], 2, "Error parsing --repeats: invalid literal for int"),
        (["bench", "--repeat", "3"], 2, "did you mean --repeats?; see tool bench --help"),
        (["bench", "--nonsense"], 2, "Unrecognized options: --nonsense"),
        (["boom"], 2, "--kind"),
        (["train", "--rate", "-1"], 2, "rate is -1.0, expected a positive one"),
        (["boom", "--kind", "input"], 2, "a.mtx:3: found x, expected y"),
        (["boom", "--kind", "diverged"], 1, "loss is NaN"),
        (["boom", "--kind", "file"], 2, "m.mtx: No such file or directory"),
        (["boom", "--kind", "os"], 1, "OSError: the disk is gone"),
        (["boom", "--kind", "memory"], 1, "out of memory"),
        (["boom", "--kind", "bug"], 1, "internal error, RuntimeError: a bug; run it with --debug"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, arguments, code, message):
    assert run(*arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tool: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


FRAMED = """
╭─ Value error ──────────╮
│ \x1b[31mBad\x1b[0m value of     │
│ --tag.                 │
│ ────────────────────── │
│ Perhaps you meant:     │
│     --tags STR         │
╰────────────────────────╯
"""
BARE = """Value error
-----------
Bad value of
--tag.
-----------
Perhaps you meant:
    --tags STR
"""


@pytest.mark.parametrize("text", [FRAMED, BARE])
def test_the_parsers_text_becomes_one_line_on_any_terminal(text):
    assert _one_line(text) == "Bad value of --tag.; did you mean --tags?"


def test_a_parser_that_says_nothing_still_gives_a_line():
    assert _one_line("") == "the arguments cannot be read"


def test_an_interrupt_is_130(capsys):
    assert run("boom", "--kind", "interrupt") == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_debug_shows_the_traceback_anywhere_before_two_dashes(capsys):
    assert run("--debug", "boom", "--kind", "bug") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "RuntimeError: a bug" in shown
    assert _without_debug(["bench", "--debug", "x"]) == (["bench", "x"], True)
    assert _without_debug(["bench", "--", "--debug"]) == (["bench", "--", "--debug"], False)


def test_a_chosen_exit_passes_through():
    with pytest.raises(SystemExit, match="7"):
        run("boom", "--kind", "exit")


def test_warnings_are_one_line_and_others_stay_what_they_are(capsys):
    assert run("warn") == 0
    assert capsys.readouterr().err == "tool: warning: values are NaN\n"

    def foreign():
        warnings.warn("not ours", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="not ours"):
        assert run(commands=foreign) == 0
    assert capsys.readouterr().err == ""


def test_the_version_is_that_of_the_package(capsys):
    assert run("--version", version="1.2.3") == 0
    assert capsys.readouterr().out == "tool 1.2.3\n"
    assert run("--version", package="pytest") == 0
    assert capsys.readouterr().out == f"tool {pytest.__version__}\n"


def test_a_closed_pipe_is_silent(capsys, monkeypatch):
    monkeypatch.setattr("tenfold_core.run.cli._silence_stdout", lambda: None)
    assert run("boom", "--kind", "pipe") == 141
    assert capsys.readouterr().err == ""


SCRIPT = """
import sys, time
from tenfold_core.run.cli import main
def many():
    while True:
        print("x" * 1000)
def wait():
    print("ready", flush=True)
    time.sleep(60)
sys.exit(main("tool", {"many": many, "wait": wait}, version="1"))
"""


def start(*arguments):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_process_stops_at_a_closed_pipe_and_at_an_interrupt():
    process = start("many")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
    process = start("wait")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "tool: interrupted\n"
    assert process.returncode == 130


def test_help_and_version_are_quick():
    started = time.perf_counter()
    assert start("--version").communicate()[0] == "tool 1\n"
    assert time.perf_counter() - started < 2  # 0.06 s on a quiet machine
