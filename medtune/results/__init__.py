"""A run's folder, and everything that reads one.

It loads no torch and knows no model.
"""
