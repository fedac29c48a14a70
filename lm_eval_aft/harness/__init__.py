"""What lm-eval's tasks give us: prompts, splits without leaks, and marks for generated answers.

May import ``engine`` and the rooms below it.
A new harness output type, or a new way of splitting documents, goes here.
"""
