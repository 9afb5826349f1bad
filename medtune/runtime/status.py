"""States of a run."""

FINISHED = ("done", "pruned")  # statuses after which nothing is left to do
