"""Rows -> train, validation and test, with nothing in common."""
