"""Many members: who runs, where, and how far.

It knows no W&B and no bitsandbytes. Read pipeline.py first.
"""
