"""Policies compared on a fixed list of clips."""
