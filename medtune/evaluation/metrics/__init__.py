"""Metrics of an answer: lexical, semantic, facts, fluency."""
