"""Reference data that finance edits: the price book, deployments, cost centres and capacity, as CSV, valid as a whole or not used."""

from aoai_usage_pipeline.reference.capacity import Capacity, Reservation
from aoai_usage_pipeline.reference.files import Reference, ReferenceDataError, load

__all__ = ["Capacity", "Reference", "ReferenceDataError", "Reservation", "load"]
