"""How text and tables fit the screen, from 80 columns on."""

import shutil
import textwrap

import tabulate as tables_library
from tabulate import tabulate

from medtune.results.reader import RunResult
from medtune.runtime.progress import shorten

tables_library.MIN_PADDING = 0  # headers need no room beside them

NARROWEST, WITHOUT_TERMINAL = 80, 120  # columns
SHORTEST_NAME, NAME_IN_TEXT = 12, 40  # characters
SEPARATOR = 2  # characters between two columns


def screen_width() -> int:
    """Returns the columns that tables may take."""
    return max(shutil.get_terminal_size((WITHOUT_TERMINAL, 24)).columns, NARROWEST)


def wrapped(text: str) -> str:
    """Returns text with lines that fit the screen, broken between words and indented as they were."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line, screen_width(), initial_indent="", subsequent_indent=indent + "  ", break_long_words=False,
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return "\n".join(lines)


def named(member: RunResult) -> str:
    """Returns a member's name as it stands in a line of text."""
    return shorten(member.name, NAME_IN_TEXT)


def side_by_side(titles: list[list[str]], columns: list[list[str]], repeated: int) -> str:
    """Returns columns, each with its header first, in as many tables as the screen needs.

    `titles` stand left in every table, and so do the first `repeated` columns where more than one fits.
    """
    for column in columns:
        column[0] = shorten(column[0], max(len(text) for text in column[1:]) if len(column) > 1 else SHORTEST_NAME)
    left = sum(width_of(column) + SEPARATOR for column in titles)
    fixed, rest = columns[:repeated], columns[repeated:]
    room = screen_width() - left - sum(width_of(column) + SEPARATOR for column in fixed)
    tables: list[list[list[str]]] = [[]]
    taken = 0
    for column in rest:
        needed = width_of(column) + SEPARATOR
        if tables[-1] and taken + needed > room:
            tables.append([])
            taken = 0
        tables[-1].append(column)
        taken += needed
    drawn = []
    for group in tables:
        header, *rows = zip(*titles, *fixed, *group, strict=True)
        drawn.append(tabulate(rows, header, disable_numparse=True))
    return "\n\n".join(drawn)


def width_of(column: list[str]) -> int:
    """Returns the characters that a column takes."""
    return max(map(len, column))
