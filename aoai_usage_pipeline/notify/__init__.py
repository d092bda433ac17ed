"""Telling people and programs that something is wrong: what an occurrence is, how it is written down, and how it reaches each target once."""
