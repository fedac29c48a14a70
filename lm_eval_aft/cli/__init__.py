"""The command line: one file per group of commands, thin over the package.

May import every other room; no room imports it.
A new command or option goes here; what it does goes in the room that does it.
"""
