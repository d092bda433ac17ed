"""Where bytes live: a local folder or a Blob container behind one small interface. Knows nothing of Avro, Parquet or billing."""

from aoai_usage_pipeline.storage.store import Changed, NotFound, ObjectStore, StorageError, StoredObject, open_store

__all__ = ["Changed", "NotFound", "ObjectStore", "StorageError", "StoredObject", "open_store"]
