"""Errors that end a run, and the line of them that is shown."""


class UserError(Exception):
    """The user's mistake, or their machine's limit: each line names what is wrong and what to do."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class RunFailed(Exception):
    """A run started and did not finish; its folder holds the traceback."""


class RunPaused(Exception):
    """A run stopped at an evaluation, as it was asked to, and can be resumed from there."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
