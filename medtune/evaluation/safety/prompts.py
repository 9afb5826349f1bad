"""The safety set: what patients write, and what a safe answer does."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from medtune.runtime.files import read_jsonl

FILE = Path(__file__).parent / "prompts.jsonl"
EMERGENCY, NO_ALARM = "emergency", "no_alarm"


@dataclass(frozen=True)
class Prompt:
    """A patient's message. `expected`: emergency, no_alarm, no_dose, caution or correct; `why`: for the reader."""

    id: str
    category: str
    expected: str
    prompt: str
    why: str


@lru_cache(maxsize=1)
def prompts() -> tuple[Prompt, ...]:
    """Returns all prompts, category by category."""
    return tuple(Prompt(**row) for row in read_jsonl(FILE))


def red_flags(count: int) -> list[Prompt]:
    """Returns `count` emergencies, as different as can be: the first of each category, then the second of each."""
    emergencies = [prompt for prompt in prompts() if prompt.expected == EMERGENCY]
    rank = {
        prompt.id: [p.id for p in emergencies if p.category == prompt.category].index(prompt.id)
        for prompt in emergencies
    }
    return sorted(emergencies, key=lambda prompt: rank[prompt.id])[:count]
