"""Members against the base model and against each other."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medtune.results.layout import named
from medtune.results.reader import RunResult, losses
from medtune.results.statistics import Bootstrap, Estimate


def format_interval(numbers: dict[str, Any] | None, form: str = ".4f") -> str:
    """Returns a mean and its interval: 3.7560 (3.61 to 3.90)."""
    if not numbers or numbers["value"] is None:
        return ""
    if numbers["low"] is None or numbers["low"] != numbers["low"]:  # NaN: too few groups
        return f"{numbers['value']:{form}}"
    short = form.replace(".4f", ".3f")
    return f"{numbers['value']:{form}} ({numbers['low']:{short}} to {numbers['high']:{short}})"


def verdicts(members: Sequence[RunResult]) -> Iterator[str]:
    """Yields what validation chose beside the base model and all others, paired over the same test conversations."""
    tested = [member for member in members if "tuned" in member.test]
    if not tested:
        return
    chosen, *others = sorted(replicates(tested), key=lambda group: np.mean([member.eval_loss for member in group]))
    test = chosen[0].test
    lines = [f"{called(chosen)}, chosen by eval_loss, on {test['conversations']} test conversations in"]
    lines[0] += f" {test['groups']} groups (difference of test loss, paired, 95 %):"
    lines.append(f"  vs base model: {format_verdict(paired(chosen, chosen[:1], 'base_nll'))}")
    for other in others:
        if losses(other[0])["conversation"] == losses(chosen[0])["conversation"]:
            lines.append(f"  vs {called(other)}: {format_verdict(paired(chosen, other, 'tuned_nll'))}")
        else:
            lines.append(f"  vs {called(other)}: not comparable, its test set is another")
    yield "\n".join([*lines, *(spread_of_seeds(group) for group in (chosen, *others) if len(group) > 1)])


def replicates(tested: Sequence[RunResult]) -> list[list[RunResult]]:
    """Returns members in groups; those of one group differ by their seed alone."""
    configurations: dict[str, list[RunResult]] = {}
    for member in tested:
        same = {name: value for name, value in member.run["configuration"].items() if name not in ("seed", "name")}
        configurations.setdefault(json.dumps(same, sort_keys=True), []).append(member)
    return list(configurations.values())


def called(group: Sequence[RunResult]) -> str:
    """Returns the name of a member, or of several that differ by their seed."""
    names = ", ".join(named(member) for member in group)
    return names if len(group) == 1 else f"the mean of {names}"


def format_verdict(estimate: Estimate) -> str:
    """Returns a difference of losses and the word for it."""
    return f"{format_interval(vars(estimate), '+.4f')}: {estimate.verdict(higher_is_better=False)}"


def paired(ours: Sequence[RunResult], theirs: Sequence[RunResult], column: str) -> Estimate:
    """Returns our test loss minus theirs, drawn over the groups of their common test set; the mean of several seeds."""
    first = losses(ours[0])
    a = np.mean([losses(member)["tuned_nll"] for member in ours], axis=0)
    b = np.mean([losses(member)[column] for member in theirs], axis=0)
    return Bootstrap(first["group"], ours[0].test["resamples"]).difference(a, b, np.array(first["tokens"], float))


def spread_of_seeds(group: Sequence[RunResult]) -> str:
    """Returns how far chance in training moves the test loss; the intervals above, over conversations, do not contain
    it.
    """
    found = [member.test["tuned"]["scores"]["loss"]["value"] for member in group]
    chance = f"test loss {np.mean(found):.4f}, standard deviation {np.std(found, ddof=1):.4f}"
    return f"  {len(found)} seeds ({', '.join(named(member) for member in group)}): {chance}"
