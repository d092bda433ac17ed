"""Tests through the public surface: the pipeline's stages, the command line, a real Dagster instance, real stores."""
