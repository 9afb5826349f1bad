"""One run, from shared inputs to a saved adapter.

It knows no sweep. Read pipeline.py first.
"""
