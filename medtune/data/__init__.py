"""Raw rows -> checked token ids. The four folders are the four steps: reading, cleaning, splitting, tokenization.

It knows no weights. Read pipeline.py first.
"""
