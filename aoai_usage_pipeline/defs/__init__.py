"""The Dagster shell: one module per stage, each with that stage's assets, checks, sensors and schedules. No arithmetic happens here."""
