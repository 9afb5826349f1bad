"""Conversations -> train, validation and test, no group in two of them."""

import hashlib

from medtune.data.normalize import Conversation


def split(
    conversations: list[Conversation], validation_fraction: float, test_fraction: float
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """Assign whole groups by the hash of their name, so that adding rows never moves an old row to another split.

    Returns (train, validation, test), each in the order of the file. The fractions hold for groups, on average.
    """
    train: list[Conversation] = []
    validation: list[Conversation] = []
    test: list[Conversation] = []
    for conversation in conversations:
        digest = hashlib.sha256(conversation.group.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < validation_fraction:
            validation.append(conversation)
        elif place < validation_fraction + test_fraction:
            test.append(conversation)
        else:
            train.append(conversation)
    return train, validation, test
