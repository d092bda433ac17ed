"""Reference data that finance edits: the price book, deployments and cost centres, as CSV, validated as a whole before anything is written."""

from aoai_usage_pipeline.reference.files import Reference, ReferenceError, load

__all__ = ["Reference", "ReferenceError", "load"]
