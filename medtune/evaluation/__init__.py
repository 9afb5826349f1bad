"""What a model scores on held-out sets.

It knows no trainer. Read pipeline.py first.
"""
