"""Exact bills for Azure OpenAI from Event Hubs Capture files.

Domain rooms, each importing only those before it: `storage`, `lake`, `capture`, `usage`, `reference`, `rating`, `billing`, `reconcile`,
`publish`. They are plain Python and SQL. `pipeline.py` puts them together for one set of `settings.py`; `defs/`, `definitions.py` and
`cli/` are the Dagster shell and the command line on top.
"""
