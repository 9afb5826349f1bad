"""Plugins that Hydra finds by name."""
