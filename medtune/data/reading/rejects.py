"""A row that cannot be a conversation."""


class RejectRow(Exception):
    """Why a row is left out, worded to follow '3 rows …', and by which rule."""

    def __init__(self, reason: str, rule: str = "unusable") -> None:
        super().__init__(reason)
        self.rule = rule
