"""Commands that medtune prints can be pasted: values in the quotes that the shell and Hydra's grammar need."""

import re
import shlex

# What both read as it stands. An = in a value is quoted by `config.overrides` before Hydra sees it.
PLAIN = re.compile(r"(?=.*[A-Za-z_/])[\w./=+-]+", re.ASCII)
VALUE = re.compile(r"null|true|false|[+-]?(nan|inf)|[+-]?[\d_.]*(e[+-]?[\d_]*)?", re.IGNORECASE)  # no text to Hydra


def is_plain(text: str) -> bool:
    """Returns whether a text needs no quotes."""
    return PLAIN.fullmatch(text) is not None and VALUE.fullmatch(text) is None


def hydra_quoted(text: str) -> str:
    """Returns a text in quotes, as Hydra's grammar reads it back.

    A quote of the same kind is escaped, and so is each backslash before one or at the end
    (https://hydra.cc/docs/advanced/override_grammar/basic).
    """
    mark = "'" if '"' in text else '"'
    escaped = re.sub(rf"(\\*)({mark}|$)", lambda found: 2 * found[1] + (f"\\{mark}" if found[2] else ""), text)
    return f"{mark}{escaped}{mark}"


def override(key: str, *values: object) -> str:
    """Returns `key=value`, or `key=[one,another]` for several values, as it can be typed in a shell."""
    texts = [str(value) for value in values]
    if len(texts) == 1:
        return f"{key}={texts[0]}" if is_plain(texts[0]) else shlex.quote(f"{key}={hydra_quoted(texts[0])}")
    listed = ",".join(text if is_plain(text) and "=" not in text else hydra_quoted(text) for text in texts)
    return shlex.quote(f"{key}=[{listed}]")
