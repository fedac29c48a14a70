"""Whole studies: models × tasks × methods × seeds from one file."""
