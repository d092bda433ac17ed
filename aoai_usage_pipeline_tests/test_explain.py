"""Explained lines: every number is one of the tables', the parts are the line, and what cannot be explained says so."""
