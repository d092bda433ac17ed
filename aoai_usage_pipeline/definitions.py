"""The code location: everything of `defs/` put together for one set of settings."""

import dagster as dg

from aoai_usage_pipeline.defs import billing, capture, cosmos, hub, notifications, publish, telemetry, usage
from aoai_usage_pipeline.defs.common import daily, with_freshness
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline.settings import Settings


def build_defs(**overrides: object) -> dg.Definitions:
    """The definitions for the settings of the environment; `overrides` are settings by name, or a whole `pipeline`."""
    pipeline = overrides.pop("pipeline", None) or Pipeline(Settings.from_env(**overrides))
    assert isinstance(pipeline, Pipeline)
    start_date = pipeline.settings.start_date
    partitions = daily(start_date)
    running = pipeline.settings.automation == "running"
    ingest, bill, documents_job, daily_run = billing.build_jobs()
    drained = pipeline.settings.drain == "on"
    drain = hub.build_job()
    stages = [capture.build(partitions, drained=drained), usage.build(partitions), billing.build(partitions)]
    documents, documents_checks = cosmos.build(partitions)
    sensor_status = dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
    schedule_status = dg.DefaultScheduleStatus.RUNNING if running else dg.DefaultScheduleStatus.STOPPED
    assets = [*([hub.drained_events] if drained else []), *(assets for assets, _ in stages), publish.usage_warehouse, *documents]
    return dg.Definitions(
        assets=with_freshness(assets, drained=drained),
        asset_checks=[*(checks for _, checks in stages), documents_checks, hub.capture_is_complete],
        jobs=[ingest, bill, documents_job, daily_run, *([drain] if drained else [])],
        sensors=[
            capture.build_sensor(ingest, bill, documents_job, daily_run, start_date, sensor_status),
            *([telemetry.build_sensor(sensor_status)] if pipeline.settings.applicationinsights_connection_string else []),
            *([notifications.build_sensor(sensor_status)] if pipeline.settings.notify_webhook_url or pipeline.settings.notify_event_hub else []),
        ],
        schedules=[
            billing.build_schedule(daily_run, start_date, schedule_status),
            *([hub.build_schedule(drain, schedule_status)] if drained else []),
        ],
        resources={"pipeline": telemetry.of_runs(pipeline)},
        executor=dg.in_process_executor,
    )


defs = build_defs()
