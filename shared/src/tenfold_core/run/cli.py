# SPDX-License-Identifier: Apache-2.0
"""The command line of every package: verbs, one-line errors and exit codes.

A verb is a function; its parameters, their annotations and the ``Args`` of its docstring become
the options, by `tyro`. This module and a package's ``cli.py`` import only the standard library:
``--version`` needs nothing else, and only the verb that was asked for is loaded and parsed.
"""

import contextlib
import difflib
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from tenfold_core.errors import ConfigError, TenfoldError, TenfoldWarning

__all__ = ["Command", "Option", "Positional", "main", "option"]

INTERRUPTED = 130
BROKEN_PIPE = 141

_POSITIONAL = object()
_T = TypeVar("_T")
Positional = Annotated[_T, _POSITIONAL]
"""Marks a parameter that is given by its place: ``files: Positional[tuple[Path, ...]]``."""


@dataclass(frozen=True, slots=True)
class Option:
    """How a parameter is spelled, for use in ``Annotated``; made by :func:`option`."""

    aliases: tuple[str, ...] = ()
    name: str | None = None
    help: str | None = None
    metavar: str | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A verb that is imported only when it runs: ``Command("package.bench:run", "Time it.")``."""

    target: str
    help: str


def option(
    *aliases: str,
    name: str | None = None,
    help: str | None = None,
    metavar: str | None = None,
    repeated: bool = False,
) -> Option:
    """Describe how a parameter is spelled; a repeated one collects one value each time.

    Example:
        >>> Out = Annotated[str, option("-o", help="where to write")]
    """
    return Option(aliases, name, help, metavar, repeated)


Verb = Callable[..., int | None] | Command | str


def main(
    prog: str,
    commands: Verb | Mapping[str, Verb],
    argv: Sequence[str] | None = None,
    *,
    version: str | None = None,
    package: str | None = None,
) -> int:
    """Run a command line and return its exit code; nothing but ``SystemExit`` passes through.

    A verb returns its exit code or None. Exit codes: 0 done, 1 failed, 2 bad input or usage,
    130 interrupted, 141 when the reader of the output went away.

    Args:
        prog: Name of the command, in front of each error.
        commands: One function, or verbs by name. ``"module:function"`` and :class:`Command` are
            imported when they are needed.
        argv: Arguments without the program's name; the process's own by default.
        version: Text of ``--version``; by default the installed version of ``package``.
        package: Distribution that is asked for its version; by default ``prog``.
    """
    arguments, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        with warnings.catch_warnings():
            _show_warnings_in_one_line(prog)
            if arguments[:1] == ["--version"]:
                _say(f"{prog} {version or _installed(package or prog)}")
                code = 0
            else:
                code = _dispatch(prog, commands, arguments)
        sys.stdout.flush()
        return code
    except TenfoldError as error:
        return _fail(prog, str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            return _fail(prog, f"{type(error).__name__}: {error}", 1, debug)
        return _fail(prog, f"{error.filename}: {error.strerror}", 2, debug)
    except MemoryError:
        return _fail(prog, "out of memory; use a smaller input or a machine with more", 1, debug)
    except Exception as error:
        text = f"internal error, {type(error).__name__}: {error}; run it with --debug and report it"
        return _fail(prog, text, 1, debug)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:cut]:
        return arguments, False
    arguments.remove("--debug")
    return arguments, True


def _dispatch(prog: str, commands: Verb | Mapping[str, Verb], arguments: list[str]) -> int:
    if not isinstance(commands, Mapping):
        return _call(prog, _load(commands), arguments)
    names = ", ".join(commands)
    if not arguments:
        raise ConfigError(f"expected a command: {names}; see {prog} --help")
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help"):
        _say(_overview(prog, commands))
        return 0
    if verb not in commands:
        close = difflib.get_close_matches(verb, commands, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {names}"
        raise ConfigError(f"unknown command {verb!r}; {hint}")
    return _call(f"{prog} {verb}", _load(commands[verb]), rest)


def _load(verb: Verb) -> Callable[..., int | None]:
    target = verb.target if isinstance(verb, Command) else verb
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _overview(prog: str, commands: Mapping[str, Verb]) -> str:
    width = max(map(len, commands))
    lines = [f"usage: {prog} [--version] [--debug] COMMAND ...", ""]
    for name, verb in commands.items():
        text = verb.help if isinstance(verb, Command) else inspect.getdoc(_load(verb)) or ""
        lines.append(f"  {name:<{width}}  {text.partition(chr(10))[0]}")
    return "\n".join([*lines, "", f"{prog} COMMAND --help describes one of them."])


def _call(prog: str, function: Callable[..., int | None], arguments: list[str]) -> int:
    """Parse the arguments of one function, then call it with them outside of the parser."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args, kwargs = tyro.cli(
                _recorder(function),
                prog=prog,
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as error:
        if not error.code:
            return 0
        raise ConfigError(f"{_one_line(complaint.getvalue())}; see {prog} --help") from None
    return int(function(*args, **kwargs) or 0)


def _recorder(function: Callable[..., Any]) -> Callable[..., tuple[tuple, dict]]:
    """Return a function of the same signature, in tyro's terms, that returns its arguments."""
    hints = get_type_hints(function, include_extras=True)

    def record(*args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        return args, kwargs

    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_for_tyro(hints.get(name, Any)))
        for name, parameter in signature.parameters.items()
    ]
    record.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=Any
    )
    record.__annotations__ = {part.name: part.annotation for part in parameters}
    record.__doc__ = function.__doc__
    record.__name__ = function.__name__
    return record


def _for_tyro(hint: Any) -> Any:
    if get_origin(hint) is not Annotated:
        return hint
    import tyro

    base, *marks = get_args(hint)
    for mark in marks:
        if mark is _POSITIONAL:
            base = tyro.conf.Positional[base]
        elif isinstance(mark, Option):
            spelling = tyro.conf.arg(
                name=mark.name, help=mark.help, metavar=mark.metavar, aliases=mark.aliases or None
            )
            base = tyro.conf.UseAppendAction[base] if mark.repeated else base
            base = Annotated[base, spelling]
        else:
            base = Annotated[base, mark]
    return base


def _one_line(text: str) -> str:
    """Reduce the parser's text to its message and its first suggestion.

    It is a title, the message and hints, divided by rules; on a UTF-8 terminal there is a frame
    around all of it and the title stands in the frame.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    framed = text.lstrip().startswith("╭")
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"^[-─]{3,}$", "\n".join(lines), flags=re.M)
    message = " ".join(sections[0 if framed else min(1, len(sections) - 1)].split())
    if match := re.search(r"Perhaps you meant:\s+(--[\w.-]+)", text.replace("│", " ")):
        message += f"; did you mean {match[1]}?"
    return message.rstrip(".") or "the arguments cannot be read"


def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _say(text: str) -> None:
    print(text)


def _fail(prog: str, text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(
        f"{prog}: {'' if code == INTERRUPTED else 'error: '}{' '.join(text.split())}",
        file=sys.stderr,
    )
    return code


def _show_warnings_in_one_line(prog: str) -> None:
    default = warnings.showwarning

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, TenfoldWarning):
            print(f"{prog}: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            default(message, category, *place, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", TenfoldWarning)


def _silence_stdout() -> None:
    """Point stdout at nothing, or the interpreter complains about the pipe once more at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
