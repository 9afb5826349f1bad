"""Schema + conf/ -> what can be chosen: the text of `--help`, and docs/reference/configuration.md.

Command: python -m medtune.config.reference > docs/reference/configuration.md
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

from medtune.config.groups import CONF, EXPERIMENTS, group_names, group_options, register
from medtune.config.keys import dataclass_of, describe_type, mapping_value_type, typed_fields
from medtune.config.schema import EvaluateConfig, PrepareConfig, RunConfig

WIDTH = 80  # columns that the help fits into
COMMANDS = {"train": RunConfig, "evaluate": EvaluateConfig, "prepare": PrepareConfig}


@dataclass
class Key:
    """One key of the configuration: its dotted name, its default as it is typed, the values it takes, its meaning."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass
class Section:
    """The keys of one group, in the order of the schema. `title` is the group's dotted name, empty at the top."""

    title: str
    about: str
    keys: list[Key] = field(default_factory=list)


def help_text(command: str) -> str:
    """Returns what `--help` of a command prints: what it does, examples, groups, keys. No line exceeds 80 columns."""
    config = composed(command)
    header = str(config["hydra"]["help"]["header"]).rstrip()
    lines = [header, "", "Groups, chosen with group=option (* is the default; the notes are in conf/):"]
    lines += list(group_lines(config))
    lines += ["", "Keys, changed with key=value; several values and -m make a sweep:"]
    for section in sections(command, config):
        lines += ["", *wrapped(": ".join(filter(None, [section.title, section.about])), 0)]
        for key in section.keys:
            lines += wrapped(f"{key.name}={key.default}" if key.default else key.name, 2)
            lines += wrapped(f"{key.meaning} [{key.values}]", 6)
    lines += ["", "Also:", *ALSO]
    return "\n".join(lines)


ALSO = (
    "  --cfg job --resolve   shows the composed configuration and runs nothing",
    "  -m, --multirun        runs a sweep: one member for each combination of values",
    "  --hydra-help          shows the options of Hydra itself",
    "  docs/reference/configuration.md says what each option of a group sets",
)


def markdown() -> str:
    """Returns the page docs/reference/configuration.md."""
    config = composed("train")
    lines = [
        "# Configuration",
        "",
        "<!-- Generated: python -m medtune.config.reference > docs/reference/configuration.md -->",
        "",
        "A run is composed from groups, one file per option in `conf/`, and from keys. Choose an option with",
        "`group=option` and change a key with `key=value`. Defaults are those of `python -m medtune.train`.",
        "",
        "## Groups and their options",
        "",
    ]
    for group in group_names():
        lines += [f"### `{group}`", ""]
        for option in group_options(group):
            mark = " (default)" if option == chosen(config, group) else ""
            lines.append(f"- `{group}={option}`{mark}: {first_comment(file_of(group, option))}")
        lines.append("")
    lines += ["## Keys", ""]
    for section in sections("train", config):
        lines += key_table(section)
    for command in ("evaluate", "prepare"):
        extra = sections(command, composed(command))[0]
        known = {key.name for key in sections("train", config)[0].keys}
        extra.keys = [key for key in extra.keys if key.name not in known]
        extra.title, extra.about = f"medtune.{command}", f"Keys that `python -m medtune.{command}` takes beside those."
        lines += key_table(extra)
    return "\n".join(lines).rstrip() + "\n"


def key_table(section: Section) -> list[str]:
    """Returns a section as a Markdown table."""
    lines = [f"### `{section.title}`" if section.title else "### Top level", ""]
    lines += [section.about, ""] if section.about else []
    lines += ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for key in section.keys:
        cells = [f"`{key.name}`", f"`{key.default}`" if key.default else "", key.values, key.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return [*lines, ""]


def composed(command: str) -> dict[str, Any]:
    """Returns the default configuration of a command as plain values, Hydra's own included."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(command, return_hydra_config=True)
    task = [str(key) for key in config if key != "hydra"]
    values = OmegaConf.to_container(OmegaConf.masked_copy(config, task), resolve=True)
    own = {"help": {"header": config.hydra.help.header}, "choices": dict(config.hydra.runtime.choices)}
    assert isinstance(values, dict)
    return {**values, "hydra": own}


def sections(command: str, config: dict[str, Any]) -> list[Section]:
    """Returns the sections of a command's configuration: its top level first, then each group."""
    return list(sections_of(COMMANDS[command], config, ""))


def sections_of(schema: type, values: dict[str, Any], prefix: str) -> Iterator[Section]:
    """Yields the section of a dataclass, then those of the dataclasses inside it. `values` are its defaults."""
    section = Section(prefix.rstrip("."), about(schema) if prefix else "")
    inner = []
    for entry, kind in typed_fields(schema):
        name, value = prefix + entry.name, values.get(entry.name)
        group = dataclass_of(kind)
        if group:
            inner.append((group, value or {}, f"{name}."))
        elif mapping_value_type(kind):
            meaning = "sources of a mixture: each NAME takes the keys of one set of conversations"
            section.keys.append(Key(f"{name}.NAME.KEY", "", "as the keys of data", meaning))
        else:
            section.keys.append(Key(name, typed_as(value), values_of(kind, entry.metadata), entry.metadata["doc"]))
    yield section
    for group, group_values, name in inner:
        yield from sections_of(group, group_values, name)


def about(schema: type) -> str:
    """Returns the first paragraph of a dataclass's docstring, without the folder that it begins with."""
    text = " ".join((schema.__doc__ or "").split("\n\n")[0].split())
    where, separator, rest = text.partition(": ")
    return rest if separator and where.startswith("conf/") else text


def values_of(kind: Any, metadata: Mapping[str, Any]) -> str:
    """Returns what a key takes: its type, its range and its unit, as "a whole number, at least 16 (tokens)"."""
    unit, bounds = metadata["unit"], span(metadata["bounds"])
    words = "a value, or a list of them" if kind is Any else describe_type(kind)
    if words.startswith("a text") and unit:
        words, unit = words.replace("a text", unit), ""
    text = ", ".join(filter(None, [words, bounds]))
    return f"{text} ({unit})" if unit else text


def span(bounds: dict[str, float | None]) -> str:
    """Returns the range of a number, as "at least 1 and below 2"."""
    return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


def typed_as(value: Any) -> str:
    """Returns a value as it is typed on the command line, long texts shortened."""
    if value is None:
        return "null"
    if value == "???":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        text = "[" + ",".join(typed_as(part) for part in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ",".join(f"{name}:{typed_as(part)}" for name, part in value.items()) + "}"
    else:
        text = str(getattr(value, "name", value))
    return textwrap.shorten(text, 60, placeholder="…")


def group_lines(config: dict[str, Any]) -> Iterator[str]:
    """Yields a line for each group with its options."""
    for group in group_names():
        default = chosen(config, group)
        options = [f"{option}*" if option == default else option for option in group_options(group)]
        first, *rest = textwrap.wrap(", ".join(options), WIDTH - 21, break_long_words=False)
        yield f"  {group:<18} {first}"
        yield from (" " * 21 + line for line in rest)


def chosen(config: dict[str, Any], group: str) -> str | None:
    """Returns the option of a group that is the default."""
    return config["hydra"]["choices"].get(group)


def wrapped(text: str, indent: int) -> list[str]:
    """Returns text in lines that fit the help, broken between words."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def file_of(group: str, option: str) -> Path:
    """Returns the YAML file of an option."""
    return (EXPERIMENTS if group == "experiment" else CONF / group) / f"{option}.yaml"


def first_comment(path: Path) -> str:
    """Returns the comment that a YAML file begins with, or else its values, in one line."""
    text = path.read_text(encoding="utf-8")
    comment = []
    for line in text.splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    if comment:
        return " ".join(comment)
    values = yaml.safe_load(text) or {}
    return ", ".join(f"`{name}: {typed_as(value)}`" for name, value in values.items())


if __name__ == "__main__":
    print(markdown(), end="")
