"""Writes the reference pages from the code: `python docs/build.py`, or `make docs`.

The dataclasses of configs/schema.py give every setting, `METRICS` every metric, the `populace`
command every option.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import typer.main

from populace.configs.schema import BOUND, Settings
from populace.population.cli.app import app
from populace.population.watching.figures import METRICS, Metric

HERE = Path(__file__).parent
REFERENCE = HERE / "reference"

SETTINGS_INTRODUCTION = """\
# Settings

Made from [configs/schema.py](../../configs/schema.py) by `make docs`; don't edit it here. A
configuration is a YAML file with these as nested keys. The command line takes them as dotted paths,
`populace run CONFIG run.max_waves=3`, and wins. An unknown key or an impossible value ends the
command before anything is written.
"""
METRICS_INTRODUCTION = """\
# Metrics

Made from [population/watching/figures.py](../../population/watching/figures.py) by `make docs`;
don't edit it here. A run exports these to Ray's metrics unless `run.metrics=false`. The names are
those that Prometheus shows. All carry the labels `population` and `controller` besides the one
named here and Ray's own; none names a user. Counters start at almost zero when a run starts, so
that a rate has something to rise from.

[Operations](../operations.md#alerts) has the alerts, [Watch a population](../howto/watch.md) the
dashboard.

| metric | kind | unit | label | |
|---|---|---|---|---|
"""
COMMANDS_INTRODUCTION = """\
# The `populace` command

Made from the command itself by `make docs`; don't edit it here. `populace COMMAND --help` says the
same.

| exit code | |
|---|---|
| 0 | it did what was asked; also a run that was stopped |
| 2 | something has to change first; one line says what |
| 75 | the same may work later: the store is away, too much at once, the shard group kept dying |
| 1 | the answer is no (`verify`, `stop` in vain, `enqueue` with bad rows), or the unforeseen |
"""


class Row(NamedTuple):
    """One setting."""

    path: str
    kind: str
    default: str
    meaning: str


# Settings


def configuration() -> str:
    parts = [SETTINGS_INTRODUCTION]
    for title, text, rows in sections():
        parts += [f"## {title}", "", *([text, ""] if text else [])]
        parts += ["| setting | type | default | |", "|---|---|---|---|"]
        parts += [f"| `{row.path}` | {row.kind} | {row.default} | {row.meaning} |" for row in rows]
        parts.append("")
    return "\n".join(parts)


def sections() -> Iterator[tuple[str, str, list[Row]]]:
    """(title, what the section is for, its settings)."""
    own = [
        field
        for field in dataclasses.fields(Settings)
        if not dataclasses.is_dataclass(_type(Settings, field.name))
    ]
    yield "The population", about(Settings), [_row(Settings, field, "") for field in own]
    for field in dataclasses.fields(Settings):
        section = _type(Settings, field.name)
        if dataclasses.is_dataclass(section):
            assert isinstance(section, type)
            yield field.name, about(section), list(_rows(section, f"{field.name}."))


def _rows(section: type, prefix: str) -> Iterator[Row]:
    for field in dataclasses.fields(section):
        yield _row(section, field, prefix)
        inner = typing.get_args(_type(section, field.name))[-1:]
        if inner and dataclasses.is_dataclass(inner[0]):  # named by the user
            yield from _rows(inner[0], f"{prefix}{field.name}.NAME.")


def _row(section: type, field: dataclasses.Field[Any], prefix: str) -> Row:
    path = prefix + field.name
    said = docstrings(section).get(field.name, "")
    if not said and not _named_sections(section, field):
        raise ValueError(f"{path} has no meaning; write a docstring below it in configs/schema.py")
    meaning = said or about(_named_sections(section, field))
    if (bound := field.metadata.get(BOUND)) is not None:
        meaning += f" {bound.wanted[0].upper()}{bound.wanted[1:]}."
    return Row(path, _kind(_type(section, field.name)), _default(field), _cell(meaning))


def _named_sections(section: type, field: dataclasses.Field[Any]) -> type | None:
    inner = typing.get_args(_type(section, field.name))[-1:]
    return inner[0] if inner and dataclasses.is_dataclass(inner[0]) else None


def about(section: type | None) -> str:
    """A section's own docstring; `dataclass` makes one up for classes that have none."""
    return "" if section is None else " ".join((ast.get_docstring(_source(section)) or "").split())


def _source(section: type) -> ast.ClassDef:
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def docstrings(section: type) -> dict[str, str]:
    """Field -> the string below it, which only the source has."""
    body, found = _source(section).body, {}
    for statement, below in itertools.pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                found[name] = " ".join(text.split())
    return found


def _type(section: type, name: str) -> Any:
    return typing.get_type_hints(section)[name]


def _kind(hint: Any) -> str:
    plain = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    arguments = typing.get_args(hint)
    if isinstance(hint, UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if typing.get_origin(hint) is dict:
        return (
            "section" if dataclasses.is_dataclass(arguments[1]) else f"name: {_kind(arguments[1])}"
        )
    if typing.get_origin(hint) is tuple:
        return f"list of {_kind(arguments[0])}"
    return plain[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "none"
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else "empty" if value in ((), "") else f"`{value}`"


# Metrics


def metrics() -> str:
    rows = []
    for metric in METRICS:
        names = "<br>".join(f"`{name}`" for name in exported_names(metric))
        values = f"`{metric.tag}`: {', '.join(metric.values)}" if metric.tag else ""
        meaning = metric.meaning
        if metric.boundaries:
            meaning += f" Buckets up to {', '.join(f'{value:g}' for value in metric.boundaries)}."
        rows.append(
            f"| {names} | {metric.kind} | {metric.unit} | {_cell(values)} | {_cell(meaning)} |\n"
        )
    return METRICS_INTRODUCTION + "".join(rows)


def exported_names(metric: Metric) -> tuple[str, ...]:
    """As Ray hands them to Prometheus."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[
        metric.kind
    ]
    return tuple(f"ray_{metric.name}{suffix}" for suffix in suffixes)


# Commands


def commands() -> str:
    parts = [COMMANDS_INTRODUCTION]
    for words, command in every_command():
        parts += [f"## `{words}`", "", inspect.cleandoc(command.help or ""), ""]
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option"]
        usage = " ".join([words, *(_argument_name(argument) for argument in arguments)])
        parts += ["```text", usage + (" [OPTIONS]" if options else ""), "```", ""]
        rows = [_argument(argument) for argument in arguments] + [
            _option(option, command) for option in options
        ]
        if rows:
            parts += ["| | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)


def every_command() -> Iterator[tuple[str, Any]]:
    """(words that call it, typer's command), in the order of `--help`."""

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner: dict[str, Any] = getattr(command, "commands", {})
        if not inner:
            yield words, command
        for name in inner:
            yield from walk(f"{words} {name}", inner[name])

    return walk("populace", typer.main.get_command(app))


def _argument_name(argument: Any) -> str:
    name = argument.name.upper() + (" …" if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _argument(argument: Any) -> str:
    return (
        f"| `{_argument_name(argument)}` | {'required' if argument.required else ''} | "
        f"{_help(argument)} |"
    )


def _option(option: Any, command: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    shown = "" if option.default is None or option.is_flag else f"`{option.default}`"
    if option.required:
        shown = "required"
    if option.envvar is not None:
        shown += f", or `${option.envvar}`"
    return (
        f"| {names}{'' if option.is_flag else ' ' + _value(option, command)} | {shown} | "
        f"{_help(option)} |"
    )


def _value(option: Any, command: Any) -> str:
    """What goes behind an option: its type, and the numbers that are allowed."""
    hint = typing.get_type_hints(inspect.unwrap(command.callback))[option.name]
    kind = next((part for part in (*typing.get_args(hint), hint) if part is not type(None)), str)
    kind = next(iter(typing.get_args(kind)), kind)
    word = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}[kind]
    if option.min is None:
        return word
    return f"{word} from {option.min:g}" + ("" if option.max is None else f" to {option.max:g}")


def _help(parameter: Any) -> str:
    return _cell(getattr(parameter, "help", None) or "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"configuration.md": configuration, "metrics.md": metrics, "cli.md": commands}


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())


if __name__ == "__main__":
    main()
