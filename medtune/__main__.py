"""What medtune can do: python -m medtune"""

import difflib
import sys

from medtune.runtime.screen import protect_streams

COMMANDS = {
    "train": "train one adapter, or a sweep of them",
    "evaluate": "evaluate adapters on the test and the safety set",
    "prepare": "look at the data before training, and write it out",
}


def main() -> None:
    """Entry point of `python -m medtune` and `medtune`: lists the commands. Exits with 2 after an unknown one."""
    protect_streams()
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    if words:
        print(f"medtune: {explain(words[0])}", file=sys.stderr)
        sys.exit(2)
    print("Fine-tune LLaMA 3 with QLoRA on patient-doctor conversations.\n")
    for name, phrase in COMMANDS.items():
        print(f"  python -m medtune.{name:<9} {phrase}")
    print("\nEach takes --help, which lists its keys. Start with: make sweep")


def explain(word: str) -> str:
    """Returns what to type instead of `medtune WORD`."""
    if word in COMMANDS:
        return f"type python -m medtune.{word} (or medtune-{word})"
    if near := difflib.get_close_matches(word, COMMANDS, n=1):
        return f"{word}: did you mean python -m medtune.{near[0]}?"
    return f"{word}: no such command; there is {', '.join(COMMANDS)}"


if __name__ == "__main__":
    main()
