"""The frozen base model and its adapters.

It knows no data set and no result folder.
"""
