"""Callbacks of the command line."""
