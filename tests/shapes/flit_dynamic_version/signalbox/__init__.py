"""Signals between parts of a program."""

__version__ = "3.1.4"
