"""Usage errors in one line, and help in plain text that breaks at spaces alone."""

import difflib
import re
import textwrap
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_UNREADABLE = re.compile(r"Input should be an? valid (\w+).*")  # of pydantic, which typer reads values with
_REGISTRY = re.compile(r"\{([\w.]+):(\w+)\}")  # in help, see config.option.Option
WIDEST_OPTION = 30  # columns for an option and its value; longer ones take a line of their own


def usage_line(error: Exception) -> str | None:
    """Return the one line for an error of the command line's parser; None for any other exception.

    Its exceptions are recognised by their methods: typer brings a parser of its own, whose classes are private.
    """
    words = getattr(error, "format_message", None)
    if not callable(words):
        return None
    context = getattr(error, "ctx", None)
    known, wrong = _known(context), _wrong(error)
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.7) if wrong else []
    message = _UNREADABLE.sub(lambda error: f"must be {_article(error[1])}", str(words()).rstrip("."))
    if wrong:
        message = f"no such {'option' if wrong.startswith('-') else 'command'}: {wrong}"
    hint = f"; did you mean {close[0]}?" if close else ""
    usage = f" ({' '.join(context.get_usage().split())})" if context is not None else ""
    return f"error: {message[:1].lower()}{message[1:]}{hint}{usage}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _wrong(error: Exception) -> str:
    """Return the unknown option or command; empty where something else is wrong."""
    if hasattr(error, "possibilities"):
        return str(getattr(error, "option_name", ""))
    message = str(getattr(error, "message", ""))
    return message.split("'")[1] if message.startswith("No such command '") else ""


def _known(context: Any) -> list[str]:
    """Return the options and sub-commands of the command that was called."""
    if context is None:
        return []
    options = [name for parameter in context.command.params for name in getattr(parameter, "opts", [])]
    return [name for name in options if name.startswith("-")] + list(getattr(context.command, "commands", {}))


class _Spaced:
    """Help in plain text: paragraphs wrap at spaces, examples keep their lines, options stand under their panels."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        width = formatter.width - 2
        text = str(getattr(self, "help", "") or "").partition("\f")[0]
        for paragraph in textwrap.dedent(text).strip().split("\n\n"):
            formatter.write("\n")
            lines = paragraph.split("\n")
            example = lines[0].startswith("pilon-compress")
            for line in lines if example else [" ".join(lines)]:
                for part in _wrap(line, width, subsequent_indent="    " if example else ""):
                    formatter.write(f"  {part}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                if argument := parameter.param_type_name == "argument":
                    record = (parameter.metavar or parameter.name.upper(), record[1])  # without its type
                record = (record[0], _REGISTRY.sub(_entries, record[1]))
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else "Options")
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    _write(formatter, records)
        if hasattr(self, "format_commands"):
            self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = getattr(self, "commands", {})
        if commands:
            with formatter.section("Commands"):
                _write(formatter, [(name, command.get_short_help_str(300)) for name, command in commands.items()])


def _entries(name: re.Match[str]) -> str:
    """Return the entries of the registry that help names: their forms, or their names."""
    registry = getattr(import_module(name[1]), name[2])
    return ", ".join(getattr(entry, "form", name) for name, entry in registry.items())


def _wrap(text: str, width: int, **options: Any) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False, **options)


def _write(formatter: Any, records: list[tuple[str, str]]) -> None:
    """Write two columns; a long name takes a line of its own."""
    indent = " " * formatter.current_indent
    first = min(max(len(name) for name, _ in records), WIDEST_OPTION, formatter.width // 3)
    width = max(20, formatter.width - formatter.current_indent - first - 2)
    for name, words in records:
        lines = _wrap(words, width) or [""]
        if len(name) > first:
            formatter.write(f"{indent}{name}\n")
            name = ""
        for place, line in enumerate(lines):
            formatter.write(f"{indent}{(name if place == 0 else '').ljust(first)}  {line}".rstrip() + "\n")


class Command(_Spaced, TyperCommand):
    """A command whose help is plain text. Options that are marked as `bare` may come without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = getattr(self.callback, "flags", [])  # of `options.configured`
        return super().parse_args(ctx, with_values(args, {flag.name for flag in flags if flag.mark.bare}))


def with_values(words: list[str], bare: set[str]) -> list[str]:
    """Return a command's words with an empty value behind each option of `bare` that has none."""
    followed = zip(words, [*words[1:], "-"], strict=False)  # of no words, none
    return [one for word, after in followed for one in ([word, ""] if word in bare and after[:1] == "-" else [word])]


class Group(_Spaced, TyperGroup):
    """A group of commands that prints its help, in plain text, where no command is named (exit code 2)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            print(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)


def application(**options: Any) -> typer.Typer:
    """Return a typer application whose help and errors are plain text."""
    return typer.Typer(
        cls=Group, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, **options
    )
