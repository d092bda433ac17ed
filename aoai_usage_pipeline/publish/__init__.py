"""What others read: the DuckDB file, made from the lake and replaceable at any time."""
