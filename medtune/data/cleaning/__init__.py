"""Rows of messages -> rows that may be trained on, each rejected row with its reason."""
