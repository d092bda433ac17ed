"""Reference data that finance edits: the price book, deployments and cost centres, as CSV, validated as a whole before anything is written."""

from aoai_usage_pipeline.reference.files import Reference, ReferenceDataError, load

__all__ = ["Reference", "ReferenceDataError", "load"]
