"""The process: errors, files, logs, progress, interruption.

It knows no configuration and no model.
"""
