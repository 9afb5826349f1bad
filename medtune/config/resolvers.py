"""Names that the configuration computes: the folder of a member, the time of a run."""

import hashlib
import re
from collections.abc import Sequence

from omegaconf import OmegaConf

LONGEST = 120  # bytes of a name, before its hash


def folder_name(overrides: Sequence[str], common: Sequence[str] = ()) -> str:
    """Returns a member's folder, from its overrides: readable, one path component, different for different overrides.

    `common`: keys that are the same for all members, left out.
    """
    plain = ",".join(word for word in overrides if word.partition("=")[0] not in common) or "defaults"
    safe = re.sub(r"[^\w=.,+~-]", "_", plain)[:LONGEST]
    while len(safe.encode()) > LONGEST:  # file systems count bytes
        safe = safe[:-1]
    if safe != plain:
        safe += "-" + hashlib.sha256(plain.encode()).hexdigest()[:8]
    return safe


# Resolvers of conf/train.yaml: a swept lora.r carries lora_alpha with it, and a member's folder is named by overrides.
OmegaConf.register_new_resolver("times", lambda factor, value: factor * value, replace=True)
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
