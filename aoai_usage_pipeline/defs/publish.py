"""`usage_warehouse`: the DuckDB file that Power BI and people read."""

import dagster as dg

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.defs.common import GROUP, ONE_RUN, OWNERS
from aoai_usage_pipeline.pipeline import Pipeline


@dg.asset(
    backfill_policy=ONE_RUN,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"duckdb"},
    deps=["raw_events", "enriched_usage", "daily_usage", "daily_billing"],
    metadata={
        "dagster/column_schema": dg.TableSchema(
            columns=[dg.TableColumn(f"{table}.{c.name}", c.type, description=c.description) for table, cs in tables.PUBLISHED.items() for c in cs]
        )
    },
)
def usage_warehouse(pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The published DuckDB file, rebuilt from the lake beside the old one and swapped in one step."""
    rows = pipeline.publish()
    return dg.MaterializeResult(
        metadata={"dagster/row_count": sum(rows.values()), "path": dg.MetadataValue.path(pipeline.settings.warehouse_path), **rows}
    )
