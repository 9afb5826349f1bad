"""States of a run."""

OVER = ("done", "pruned")  # statuses after which nothing is left to do
