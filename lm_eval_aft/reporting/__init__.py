"""Comparing runs: statistics on paired documents."""
