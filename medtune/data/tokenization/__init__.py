"""Conversations -> token ids and loss mask."""
