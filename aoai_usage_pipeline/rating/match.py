"""Which reference row applies: the one in force on the usage date with the most exact matches. Set-based, over distinct keys only."""

from collections.abc import Iterable, Sequence

import duckdb
import pyarrow as pa

from aoai_usage_pipeline.reference.files import COST_CENTERS, DEPLOYMENTS, PRICE_BOOK, Reference, Row, _Spec

METER_QUANTITIES = {
    "input": """prompt_tokens - coalesce(cached_tokens, 0) - coalesce(cache_write_tokens, 0)
        - coalesce(audio_prompt_tokens, 0) + coalesce(cached_audio_tokens, 0) - coalesce(image_prompt_tokens, 0)""",
    "cached_input": "cached_tokens - coalesce(cached_audio_tokens, 0)",
    "cache_write": "cache_write_tokens",
    "audio_input": "audio_prompt_tokens - coalesce(cached_audio_tokens, 0)",
    "cached_audio_input": "cached_audio_tokens",
    "image_input": "image_prompt_tokens",
    "output": "completion_tokens - coalesce(audio_completion_tokens, 0) - coalesce(image_completion_tokens, 0)",
    "audio_output": "audio_completion_tokens",
    "image_output": "image_completion_tokens",
}
"""How many tokens of a request each meter counts. The meters are disjoint and add up to prompt + completion tokens."""

METER_DETAILS = {
    "cached_input": "cached_tokens",
    "cache_write": "cache_write_tokens",
    "audio_input": "audio_prompt_tokens",
    "cached_audio_input": "cached_audio_tokens",
    "image_input": "image_prompt_tokens",
    "audio_output": "audio_completion_tokens",
    "image_output": "image_completion_tokens",
}
"""The column without which a meter has no quantity; meters that are not named here may always have one."""

LONG_CONTEXT_TOKENS = 272_000
"""Above this many prompt tokens a whole request is in the long context band of models that have one (Azure price list)."""

_BEST = """
CREATE OR REPLACE TABLE {target} AS
SELECT k.*, arg_max(struct_pack({gives}), r.exact) FILTER (r.exact IS NOT NULL) AS best
FROM (SELECT DISTINCT {keys} FROM {source}) AS k LEFT JOIN {rows} AS r
ON (r.effective_from IS NULL OR r.effective_from <= k.usage_date) AND (r.effective_to IS NULL OR k.usage_date < r.effective_to)
{conditions}
GROUP BY ALL
"""


def load_reference(db: duckdb.DuckDBPyConnection, reference: Reference) -> None:
    """Put the reference rows into the tables `price_book`, `deployments` and `cost_centers` of a connection."""
    for table, spec, rows in (
        ("price_book", PRICE_BOOK, reference.price_book),
        ("deployments", DEPLOYMENTS, reference.deployments),
        ("cost_centers", COST_CENTERS, reference.cost_centers),
    ):
        _load(db, table, spec, rows)
    db.execute("ALTER TABLE price_book ALTER unit_price TYPE DECIMAL(18,9)")
    db.execute("ALTER TABLE price_book ALTER unit_tokens TYPE BIGINT")


def _load(db: duckdb.DuckDBPyConnection, table: str, spec: _Spec, rows: Sequence[Row]) -> None:
    columns = {name: pa.array([row.values[name] for row in rows], pa.string()) for name in spec.columns[:-2]}
    columns["exact"] = pa.array([sum(row.values[name] is not None for name in spec.matches) for row in rows], pa.int32())
    for name in ("effective_from", "effective_to"):
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.date32())
    loaded = pa.table(columns)  # noqa: F841 - read by name in the next statement
    db.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM loaded")


def _best(target: str, source: str, rows: str, keys: Iterable[str], matches: Iterable[str], gives: Iterable[str], extra: str = "") -> str:
    conditions = "\n".join(f"AND (r.{name} IS NULL OR r.{name} = k.{name})" for name in matches) + extra
    return _BEST.format(
        target=target, source=source, rows=rows, keys=", ".join(keys), gives=", ".join(f"{g} := r.{g}" for g in gives), conditions=conditions
    )


def match_deployments(source: str) -> str:
    """SQL: the table `deployment_of`, each distinct event key of `source` with its best row of `deployments` as the struct `best`."""
    return _best("deployment_of", source, "deployments", ("usage_date", *DEPLOYMENTS.matches), DEPLOYMENTS.matches, DEPLOYMENTS.gives)


def match_owners(source: str) -> str:
    """SQL: the table `owner_of`, each distinct payer of `source` with its best row of `cost_centers` as the struct `best`."""
    return _best("owner_of", source, "cost_centers", ("usage_date", *COST_CENTERS.matches), COST_CENTERS.matches, COST_CENTERS.gives)


def match_prices(source: str, meters: Sequence[str] = tuple(METER_QUANTITIES)) -> str:
    """SQL: the table `rate_of`, for each distinct priced key of `source` and each of the meters the price row and the exact price of one token.

    Cached input without a row of its own is rated at the input row and has status `fallback`. `token_price` is unit price / unit tokens,
    by multiplication with a power of ten, so it is exact.
    """
    rows = " UNION ALL ".join(f"SELECT '{meter}' AS meter" for meter in meters)
    keyed = f"(SELECT s.*, m.meter FROM {source} AS s CROSS JOIN ({rows}) AS m)"
    gives = ("price_id", "unit_price", "unit_tokens", "currency")
    best = _best("price_of", keyed, "price_book", ("usage_date", *PRICE_BOOK.matches, "meter"), PRICE_BOOK.matches, gives, "\nAND r.meter = k.meter")
    same = " AND ".join(f"i.{name} IS NOT DISTINCT FROM p.{name}" for name in ("usage_date", *PRICE_BOOK.matches))
    return f"""{best};
CREATE OR REPLACE TABLE rate_of AS
WITH resolved AS (
    SELECT p.* EXCLUDE (best), coalesce(p.best, i.best) AS row,
    CASE WHEN p.best IS NOT NULL THEN 'priced' WHEN i.best IS NOT NULL THEN 'fallback' ELSE 'unpriced' END AS pricing_status
    FROM price_of AS p LEFT JOIN price_of AS i ON p.meter = 'cached_input' AND i.meter = 'input' AND {same}
)
SELECT * EXCLUDE (row), row.price_id, row.unit_price, row.unit_tokens, row.currency,
    CAST(CAST(row.unit_price AS DECIMAL(24,9)) * CASE row.unit_tokens WHEN 1 THEN 1.000000 WHEN 10 THEN 0.100000 WHEN 100 THEN 0.010000
        WHEN 1000 THEN 0.001000 WHEN 10000 THEN 0.000100 WHEN 100000 THEN 0.000010 WHEN 1000000 THEN 0.000001 END AS DECIMAL(20,15)) AS token_price
FROM resolved
"""
