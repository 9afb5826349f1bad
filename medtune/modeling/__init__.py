"""The frozen base and its adapters.

It knows no data set and no result folder.
"""
