"""A prepared set -> tables, a histogram in the terminal and as a picture, conversations with target tokens marked."""

from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medtune.data.funnel import RULES, left_out, notes, smaller
from medtune.data.store import SPLITS, Conversation

console = Console(highlight=False, soft_wrap=True)
SHOWN = 12  # lines of a table that could be long
BINS = 20
# Of a token, by whether it is a target token, and whether it is a control token.
STYLES = {(True, True): "bold green", (True, False): "green", (False, True): "cyan", (False, False): "bright_black"}


def line(text: str) -> None:
    """Prints a line."""
    console.print(Text(text))


def report(counted: dict[str, Any]) -> None:
    """Prints sources, funnel, text rules, red flags, splits and leaks of a set."""
    for source in counted["sources"]:
        line(f"{source['name']}: {source['rows']:,} rows of {source['from']}, read as {source['layout']}")
        line(f"  licence: {source['license']}" + ("" if source["redistributable"] else "; not to be passed on"))
    left = counted["funnel"]["read"]
    funnel = table("funnel", "rows", "left")
    funnel.add_row("read", f"{left:,}", f"{left:,}")
    for rule, count in left_out(counted).items():
        left -= count
        funnel.add_row(f"{rule}: {RULES[rule]}", f"-{count:,}", f"{left:,}")
    funnel.add_row("kept", "", f"{left:,}")
    console.print(funnel)
    for reason, count in list(counted["unusable"].items())[:SHOWN]:
        line(f"  unusable: {count:,} {reason}")
    for said in notes(counted):
        line(said)
    if counted["changed"]:
        changed = table("text rules", "rows changed")
        for rule, count in counted["changed"].items():
            changed.add_row(rule, f"{count:,}")
        console.print(changed)
    red_flags(counted["redflag"])
    splits = table("source", *SPLITS)
    for source, sizes in sorted(counted["by_source"].items(), key=lambda item: -sum(item[1].values()))[:SHOWN]:
        splits.add_row(source, *(f"{sizes[name]:,}" for name in SPLITS))
    if len(counted["by_source"]) > SHOWN:
        splits.add_row(f"… {len(counted['by_source']) - SHOWN} more", *[""] * len(SPLITS))
    splits.add_row("all", *(f"{counted['splits'][name]:,}" for name in SPLITS))
    console.print(splits)
    for said in smaller(counted):
        line(said)
    leaks(counted["leakage"], counted["groups"])


def red_flags(audit: dict[str, Any]) -> None:
    """Prints how many patients describe an emergency, and how many answers send them to urgent care."""
    if not audit["emergencies"]:
        line("red flags: no patient describes an emergency that the patterns know")
        return
    flags = table(f"red flags (data.redflag={audit['policy']})", "emergencies", "sent to urgent care")
    for category, counts in sorted(audit["by_category"].items(), key=lambda item: -item[1]["emergencies"]):
        flags.add_row(category, f"{counts['emergencies']:,}", f"{counts['urged']:,}")
    flags.add_row("all", f"{audit['emergencies']:,}", f"{audit['urged']:,}")
    console.print(flags)


def leaks(found: dict[str, Any], groups: int) -> None:
    """Prints what is in two splits, and what would be if rows were drawn at random."""
    line(
        f"leaks: of {found['held_out']:,} held-out conversations, {found['exact_questions']:,} have their question in "
        f"another split, {found['near_questions']:,} nearly, {found['groups']:,} their group ({groups:,} groups)"
    )
    line(
        f"  a random split by row would leak {found['questions_if_split_by_row']:.1%} of the questions and "
        f"{found['groups_if_split_by_row']:.1%} of the groups"
    )


def lengths(tokens: Any, max_length: int, model: str, picture: Path) -> None:
    """Prints a histogram of the conversations' lengths in tokens, and draws it into the PNG file `picture`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = [length for name in SPLITS for length in getattr(tokens, name)["length"]] + tokens.too_long_lengths
    ordered = sorted(found)
    longest = ordered[-1]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    counts, edges, _ = axes.hist(found, bins=BINS, color="#3b7a57")
    axes.axvline(max_length, color="#b03a2e", linestyle="--", label=f"trainer.max_length = {max_length}")
    axes.set(xlabel=f"tokens per conversation ({model})", ylabel="conversations")
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    line(
        f"length in tokens of {model}: median {ordered[len(ordered) // 2]:,}, 95 % up to "
        f"{ordered[int(0.95 * (len(ordered) - 1))]:,}, longest {longest:,}"
    )
    block = "█" if "utf" in console.encoding else "#"
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        bar = block * round(40 * count / max(counts)) or (block if count else "")
        mark = "  <- trainer.max_length" if start < max_length <= end else ""
        line(f"  {start:>7,.0f} to {end:>7,.0f} {bar} {int(count):,}{mark}")
    over = sum(length > max_length for length in found)
    lost = len(tokens.too_long)
    line(f"  longer than trainer.max_length={max_length}: {over:,}; {lost:,} of them left out, others lose early turns")


def example(tokenizer: Any, row: dict[str, Any], conversation: Conversation) -> None:
    """Prints a conversation as the model sees it, target tokens in colour; without colours ⟦ ⟧ stand around them."""
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    pairs = [(i, label != -100, i in control) for i, label in zip(row["input_ids"], row["labels"], strict=True)]
    text = Text()
    for (target, special), run in groupby(pairs, key=lambda pair: pair[1:]):
        written = tokenizer.decode([i for i, _, _ in run])
        if console.no_color or not console.is_terminal:
            text.append(f"⟦{written}⟧" if target else written)
        else:
            text.append(written, STYLES[target, special])
    targets = sum(target for _, target, _ in pairs)
    console.rule(f"{conversation.source}, row {conversation.row}: {len(pairs)} tokens, {targets} target tokens")
    console.print(text)


def table(name: str, *columns: str) -> Table:
    """Returns a table with numbers on the right."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column(name)
    for column in columns:
        made.add_column(column, justify="right")
    return made
