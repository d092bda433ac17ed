"""The lake: Parquet under one root, how it is named, replaced and read. Knows tables and digests, not what is in them."""
