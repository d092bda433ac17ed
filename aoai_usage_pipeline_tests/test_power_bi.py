"""The Power BI project says what the tables say, its sums are the bill's, and Microsoft's own tools can read it."""

import datetime as dt
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pbi_parsers import dax

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.billing import fixed_costs
from aoai_usage_pipeline.lake.days import Days
from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest
from aoai_usage_pipeline.publish import documents
from aoai_usage_pipeline.rating import match
from aoai_usage_pipeline.storage import open_store
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.power_bi import Project
from aoai_usage_pipeline_tests.power_bi_measures import Measures, remainder
from aoai_usage_pipeline_tests.power_bi_queries import Queries, Table, files
from aoai_usage_pipeline_tests.support import DAY, Run, capture, chat, hub_event, lines, seed_event

FOLDER = ROOT / "infra/powerbi"
PROJECT = Project(FOLDER)
TOOLS = ROOT / ".powerbi"
FACTS = {
    "Daily billing": "daily_billing",
    "Daily usage": "daily_usage",
    "Hourly usage": "enriched_usage",
    "Daily quality": "daily_quality",
    "Quarantine": "quarantine",
    "Capture files": "capture_files",
}
DIMENSIONS = {"Date", "Payer", "Deployment", "Meter", "Billing period"}
MONEY = ("cost", "list_cost", "contracted_cost")
TYPES = {"DATE": "dateTime", "TIMESTAMP": "dateTime", "VARCHAR": "string", "BIGINT": "int64", "INTEGER": "int64", "DECIMAL": "double"}
M_TYPES = {
    "DATE": "type date",
    "TIMESTAMP": "type datetime",
    "VARCHAR": "type text",
    "BIGINT": "Int64.Type",
    "INTEGER": "Int64.Type",
    "DECIMAL": "type number",
}

MADE = {
    "Daily billing": {"payer_key", "deployment_key", *(f"{name}_{part}" for name in MONEY for part in ("millionths", "remainder"))},
    "Daily usage": {"payer_key", "deployment_key"},
    "Hourly usage": {
        "payer_key", "deployment_key", "hour", "requests", "failed", "throttled", "lag_seconds", "longest_lag_seconds", "last_enqueued_at",
    },
    "Daily quality": set(),
    "Quarantine": set(),
    "Capture files": {"file", "files"},
}  # fmt: skip
"""What Power Query makes of the published columns, by table."""

READ = {"Hourly usage": {"event_time", "enqueued_at", "status_code"}, "Capture files": {"blob"}, "Daily billing": set(MONEY)}
"""Published columns that are in the model as something else only."""

LEFT_OUT = {
    "Daily billing": {"line_id"},  # another text on every line, which is what a model in memory is largest with
    "Daily usage": {"cost", "currency"},  # the bill's are the only ones
    "Hourly usage": {c.name for c in tables.ENRICHED_USAGE}
    - {
        "usage_date",
        "event_time",
        "enqueued_at",
        "status_code",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        *tables.DIMENSIONS,
    },  # of one request
    "Daily quality": set(),
    "Quarantine": {"offset", "record_index", "body_sha256"},  # blob and sequence number find the record
    "Capture files": {"etag", "events", "first_sequence_number", "last_sequence_number"},  # of one file; events are parsed + quarantined
}


def published(table: str) -> dict[str, tables.Column]:
    return {column.name: column for column in tables.PUBLISHED[FACTS[table]]}


def kind(column: tables.Column) -> str:
    return column.type.partition("(")[0]


# --- columns -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", FACTS)
def test_columns_are_the_published_ones(table: str) -> None:
    has = {column.properties["sourceColumn"]: column for column in PROJECT.tables[table].of("column")}
    columns = published(table)
    assert has.keys() - columns.keys() == MADE[table]
    assert columns.keys() - has.keys() == LEFT_OUT[table] | READ.get(table, set())
    for name in has.keys() & columns.keys():
        assert has[name].properties["dataType"] == TYPES[kind(columns[name])], name
        assert has[name].description == columns[name].description, name


@pytest.mark.parametrize("table", FACTS)
def test_power_query_reads_published_columns_with_their_types(table: str) -> None:
    m = PROJECT.m()[table]
    columns = published(table)
    chosen = re.findall(r'"(\w+)"', re.search(r"Table\.SelectColumns\(Rows, \{([^}]*)\}, MissingField\.UseNull\)", m)[1])
    typed = dict(re.findall(r'\{"(\w+)", ((?:type )?[\w.]+)\}', re.search(r"Table\.TransformColumnTypes\(\w+, \{(.*?)\}, \"en-US\"\)", m)[1]))
    assert set(chosen) <= columns.keys() and len(chosen) == len(set(chosen))
    assert set(typed) == set(chosen) - set(MONEY if table == "Daily billing" else ())
    for name in set(typed) & columns.keys():
        assert typed[name] == M_TYPES[kind(columns[name])], name
    for column in PROJECT.tables[table].of("column"):
        assert f'"{column.properties["sourceColumn"]}"' in m, column.name


def test_money_is_never_a_rounded_number() -> None:
    """An amount comes as two whole numbers, whose sums are exact; no column holds it as a number with a point."""
    m = PROJECT.m()["Daily billing"]
    for name in MONEY:
        assert f'"{name}_millionths", each Millionths([{name}]), Int64.Type' in m and f'"{name}_remainder", each Remainder([{name}]), Int64.Type' in m
        for part in ("millionths", "remainder"):
            [column] = [c for c in PROJECT.tables["Daily billing"].of("column") if c.properties["sourceColumn"] == f"{name}_{part}"]
            assert column.properties["dataType"] == "int64"
    for name in ("Millionths", "Remainder"):
        text = PROJECT.expressions[name].value
        assert text.count("Precision.Decimal") == text.count("Value."), "the plain operators compute in binary"


def test_dimensions_have_every_dimension_of_the_daily_tables_and_join_by_it() -> None:
    labels = {(t, c): o.properties["sourceColumn"] for (t, c), o in PROJECT.columns.items()}
    m = {table: PROJECT.m()[table] for table in ("Daily billing", "Daily usage", "Hourly usage")}
    of = {}
    for dimension in ("Payer", "Deployment"):
        source = PROJECT.tables[dimension].one("partition").one("source").value
        found = {table: [labels[table, column] for column in re.findall(rf"'{table}'\[([^\]]+)\]", source)] for table in m}
        [names] = {tuple(names) for names in found.values()}
        of[dimension] = names[1:]
        assert names[0] == f"{dimension.lower()}_key"
        for text in m.values():
            assert f'"{names[0]}", each Key({{{", ".join(f"[{name}]" for name in names[1:])}}})' in text
    assert ("usage_date", *of["Payer"], *of["Deployment"]) == tables.DIMENSIONS


KINDS = {"tokens": set(match.TOKEN_METERS), "capacity": {fixed_costs.PROVISIONED}, "idle": {fixed_costs.IDLE, fixed_costs.UNUSED}}


def test_meters_are_of_the_kinds_the_pipeline_knows() -> None:
    source = PROJECT.tables["Meter"].one("partition").one("source").value
    of = {name: set(re.findall(r'"(\w+)"', found)) for found, name in re.findall(r'\[Meter\] (?:IN|=) (.*), "(\w+)"', source)}
    assert of == KINDS


# --- relationships, security, refresh ----------------------------------------------------------------------------------------------


def test_the_model_is_a_star() -> None:
    pairs = set()
    for relationship in PROJECT.of("relationship").values():
        ends = []
        for end in ("fromColumn", "toColumn"):
            table, _, column = re.fullmatch(r"('[^']+'|\w+)(\.)('[^']+'|\w+)", relationship.properties[end]).groups()
            ends.append((table.strip("'"), column.strip("'")))
        assert ends[0][0] in FACTS and ends[1][0] in DIMENSIONS
        assert ends[0][1] == ends[1][1] or (ends[1] == ("Date", "Date") and ends[0][1] in ("Usage date", "Capture date"))
        assert PROJECT.columns[ends[0]].properties["dataType"] == PROJECT.columns[ends[1]].properties["dataType"]
        assert relationship.properties.keys() == {"fromColumn", "toColumn"}, "active, many to one, filtering one way"
        pairs.add((ends[0][0], ends[1][0]))
    assert len(pairs) == len(PROJECT.of("relationship"))
    assert {fact for fact, dimension in pairs if dimension == "Date"} == set(FACTS)
    payers = {"Daily billing", "Daily usage", "Hourly usage"}
    assert {fact for fact, dimension in pairs if dimension == "Payer"} == payers == {fact for fact, dimension in pairs if dimension == "Deployment"}
    assert PROJECT.tables["Date"].properties["dataCategory"] == "Time" and "isKey" in PROJECT.columns["Date", "Date"].properties


def test_a_cost_centre_reader_sees_nothing_but_its_cost_centres() -> None:
    """Every table of the model is filtered by the payer, hidden from readers, or names nobody."""
    role = PROJECT.of("role")["Cost centre reader"]
    filters = {permission.name: permission.value for permission in role.of("tablePermission")}
    assert filters.pop("Payer")
    assert filters.pop("Readers") == "'Readers'[User] = USERPRINCIPALNAME()"
    assert set(filters.values()) == {"FALSE()"}
    assert set(PROJECT.tables) == {"Daily billing", "Daily usage", "Hourly usage", "Payer", "Readers", *filters, *(DIMENSIONS - {"Payer"})}
    for dimension in DIMENSIONS - {"Payer"}:
        assert not {"Cost centre", "Team", "Department", "Application", "Product"} & {c.name for c in PROJECT.tables[dimension].of("column")}
    assert not PROJECT.of("role")["Everything"].of("tablePermission")


def test_only_the_days_of_a_partition_are_read_and_only_when_they_changed(root: Path) -> None:
    """The prefixes of the model are names of objects that the pipeline really writes, followed by the day."""
    lake = open_store(str(root / "lake"), create=True)
    names = {table: Days(lake, table).name(DAY.date()) for table in tables.PUBLISHED}
    for table in FACTS:
        policy = PROJECT.tables[table].one("refreshPolicy")
        assert policy.one("sourceExpression").value == PROJECT.m()[table]
        prefix = re.fullmatch(r'LastChange\("([^"]+)", RangeStart, RangeEnd\)', policy.one("pollingExpression").value)[1]
        if table in ("Quarantine", "Capture files"):
            assert prefix == "manifests/capture_date="
        else:
            assert names[FACTS[table]] == f"{prefix}{DAY:%Y-%m-%d}/data.parquet"
            assert f'Published("{FACTS[table]}", RangeStart, RangeEnd)' in PROJECT.m()[table]
    assert {"files", "quarantine"} <= set(Manifest.__dataclass_fields__)
    # a day is in one partition, and not in the next one too
    assert "each [Day] >= First and [Day] < Until" in PROJECT.m()["FilesBetween"] and "[usageDate] < Until" in PROJECT.m()["CosmosRows"]
    listed = re.findall(r'"(\w+)"', re.search(r"Table\.FromRecords\(\[Manifest\]\[files\], \{([^}]*)\}", PROJECT.m()["CaptureFiles"])[1])
    assert listed and set(listed) <= set(FileEntry.__dataclass_fields__)


def test_the_days_reach_from_the_first_year_to_the_last_day_of_any_fact_and_end_with_the_bill() -> None:
    source = PROJECT.tables["Date"].one("partition").one("source").value
    days = {
        f"'{table}'[{'Capture' if table == 'Capture files' else 'Usage'} date]"
        for table in ("Daily billing", "Daily usage", "Daily quality", "Capture files")
    }
    for name, of in (("MIN", "begins"), ("MAX", "latest")):
        assert set(re.findall(rf"{name}\(([^)]*)\)", re.search(rf"VAR {of} = (.*)", source)[1])) == days
    assert "CALENDAR(DATE(YEAR(COALESCE(begins, ends)), 1, 1), ends)" in source and "VAR ends = COALESCE(latest, UTCTODAY())" in source
    assert "VAR billed = MAX('Daily billing'[Usage date])" in source and '"Billed", [Date] <= billed' in source


SOURCES = {
    "Lake": {"ContainerObjects", "ReferenceObjects"},
    "Cosmos DB": {"MirrorTables", "ReferenceObjects"},
    "Folder": {"FolderObjects", "ReferenceFiles"},
    "DuckDB": {"DuckDbRows", "ReferenceFiles"},
}
"""The queries that open what each value of the parameter Source needs."""


def test_each_source_is_opened_by_queries_of_its_own() -> None:
    """So a source that is not used can be taken out before publishing, as docs/power-bi.md says."""
    opens = re.compile(r"\b(?:AzureStorage|Folder|File|Odbc|Sql|Web|CosmosDB|DocumentDB|OData|Lakehouse|Fabric)\.\w+\(([^,)]*)")
    found = {where: opens.findall(text) for where, text in PROJECT.m().items() if opens.search(text)}
    assert found.keys() == set().union(*SOURCES.values())
    parameters = {name for name, expression in PROJECT.expressions.items() if "IsParameterQuery" in expression.value}
    for where, opened in found.items():
        # the service refreshes only what it finds without running the query: a parameter as it is
        assert len(opened) == 1 and opened[0] in parameters, where
        # a query that refers to another query may not open a source itself; a function is a part of the query that calls it
        assert re.match(r"\(.*\) as table =>", PROJECT.expressions[where].value), where
    text = (ROOT / "docs/power-bi.md").read_text()
    for source, used in SOURCES.items():
        replaced = ", ".join(f"`{name}`" for name in PROJECT.expressions if name in found.keys() - used)
        assert f"| {source} | {replaced} |" in text


def test_what_reads_the_lake_is_a_function() -> None:
    """Only so is the source opened in the query that loads a table, whatever Source says; the one other query has no source beside it."""
    kinds = {name: expression.value for name, expression in PROJECT.expressions.items() if "IsParameterQuery" not in expression.value}
    assert {name for name, value in kinds.items() if not re.match(r"\([^)]*\) as \w+ =>", value)} == {"ReaderRows"}
    assert [where for where, text in PROJECT.m().items() if "ReaderRows" in text] == ["Readers"]


def test_lineage_tags_and_names_are_there_once() -> None:
    objects = [*PROJECT.tables.values(), *PROJECT.columns.values(), *PROJECT.expressions.values()]
    objects += [measure for table in PROJECT.tables.values() for measure in table.of("measure")]
    tags = [found.properties["lineageTag"] for found in objects]
    assert len(set(tags)) == len(tags) > 200
    names = [measure.name.lower() for table in PROJECT.tables.values() for measure in table.of("measure")]
    assert len(set(names)) == len(names)
    for table in PROJECT.tables.values():
        own = [found.name.lower() for kind in ("column", "measure") for found in table.of(kind)]
        assert len(set(own)) == len(own), table.name
    queries = re.search(r"PBI_QueryOrder = (\[.*\])", (PROJECT.model / "definition/model.tmdl").read_text())[1]
    assert set(json.loads(queries)) == PROJECT.expressions.keys() | {t for t in PROJECT.tables if PROJECT.tables[t].one("partition").value == "m"}


# --- measures ------------------------------------------------------------------------------------------------------------------------


def test_every_measure_is_described_formatted_and_in_a_folder() -> None:
    assert len(PROJECT.measures) > 60
    for name, measure in PROJECT.measures.items():
        assert measure.description and measure.properties["displayFolder"], name
        assert "formatString" in measure.properties or name == "Currency shown", name
    for table in PROJECT.tables.values():
        assert table.description and all(column.description for column in table.of("column")), table.name
        shown = [c.name for c in table.of("column") if "isHidden" not in c.properties and c.properties["dataType"] != "string"]
        assert all("formatString" in PROJECT.columns[table.name, name].properties for name in shown)


def test_every_name_in_dax_exists() -> None:
    made = {"Date": {"Date", "Value"}, "Meter": {"Meter"}}
    for where, text in PROJECT.dax().items():
        code = re.sub(r'"[^"]*"', '""', text)
        for table, column in re.findall(r"'([^']+)'\[([^\]]+)\]", code):
            assert (table, column) in PROJECT.columns, (where, table, column)
        for name in re.findall(r"(?<!')\[([^\]]+)\]", code):
            assert name in PROJECT.measures or name in made.get(where, ()), (where, name)
        for table in re.findall(r"'([^']+)'", re.sub(r"'[^']+'\[[^\]]+\]", "", code)):
            assert table in PROJECT.tables, (where, table)


def test_dax_can_be_parsed() -> None:
    for where, text in PROJECT.dax().items():
        try:
            assert dax.to_ast(text) is not None
        except Exception as error:  # the parser raises whatever it stumbles over
            raise AssertionError(f"{where}: {error!r}\n{text}") from error
    for text in ("DIVIDE([Cost], 2", "[Cost] +", "[Cost] [Requests]", "VAR x = 1"):
        with pytest.raises((ValueError, AssertionError)):
            dax.to_ast(text)


PRICES = """price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency,effective_from,effective_to,meter_id,source
in-1,gpt-4o,*,*,*,*,*,input,2.503,1000000,USD,2024-01-01,,,test
out-1,gpt-4o,*,*,*,*,*,output,10.000000007,1000000,USD,2024-01-01,,,test
"""


@pytest.fixture
def bill(root: Path, aoai_usage: Run) -> tuple[Path, list[str]]:
    """The published file of a small bill, and what `aoai-usage bill` prints as its total."""
    (root / "reference/price_book.csv").write_text(PRICES)
    (root / "reference/contract_prices.csv").write_text("price_id,discount,effective_from\nin-1,7.5,2026-01-01\n")
    bodies = [seed_event(f"a{n}", DAY, chat(1_000_003 + n, 77 + n)) for n in range(9)]
    bodies += [hub_event("b", DAY, 13, 7, 20), seed_event("c", DAY, None), seed_event("d", DAY, chat(5, 5), SubscriptionId="nobody"), b"[broken]"]
    capture(root, DAY.replace(hour=1), *bodies, bodies[0])
    code, out, _ = aoai_usage("bill", "--from", "2026-10-05", "--to", "2026-10-05")
    assert code == 0
    [total] = lines(out, "Total")
    return root / "warehouse.duckdb", total


def measures(db: duckdb.DuckDBPyConnection, selected: Mapping[str, list[str]] | None = None) -> Measures:
    return Measures(db, PROJECT, FACTS, KINDS, selected or {})


def test_the_measures_are_what_the_bill_says(bill: tuple[Path, list[str]]) -> None:
    path, total = bill
    with duckdb.connect(str(path), read_only=True) as db:
        of = measures(db)
        assert [f"{of[name]:,}" for name in ("Requests", "Prompt tokens", "Completion tokens")] == total[2:5]
        assert f"{of['Cost'].normalize():f} USD" == total[5] and of["Cost"] != round(of["Cost"], 4)
        quality = db.execute("SELECT parsed, accepted, duplicates, no_usage, unallocated FROM daily_quality").fetchall()[0]
        assert tuple(of[name] for name in ("Events", "Accepted requests", "Duplicates", "No usage", "Unallocated")) == quality == (13, 12, 1, 1, 1)


BILL, USAGE, HOURS, FILES = "FROM daily_billing", "FROM daily_usage", "FROM enriched_usage", "FROM capture_files"
FIXED, IDLE = "meter IN ('provisioned_capacity', 'idle_capacity', 'unused_reservation')", "meter IN ('idle_capacity', 'unused_reservation')"
COUNTS = f"meter IN ({', '.join(repr(meter) for meter in sorted(match.TOKEN_METERS))})"
# the month of the bill is October 2026, its last day the 6th
TO_DATE, BEFORE = "usage_date BETWEEN '2026-10-01' AND '2026-10-06'", "usage_date BETWEEN '2026-09-01' AND '2026-09-06'"
LAG = "epoch_us(enqueued_at) - epoch_us(event_time)"
EXPECTED = {
    "Capture files read": f"count(*) {FILES}",
    "Unreadable files": f"count(*) {FILES} WHERE status = 'unreadable'",
    "Captured records": f"sum(records) {FILES}",
    "Captured bytes": f"sum(bytes) {FILES}",
    "Quarantine rate": f"sum(quarantined) / sum(events) {FILES}",
    "Cost": f"sum(cost) {BILL}",
    "Cost unrounded": f"sum(cost) {BILL}",
    "List cost": f"sum(list_cost) {BILL}",
    "Contracted cost": f"sum(contracted_cost) {BILL}",
    "Currencies": f"count(DISTINCT currency) {BILL}",
    "Currency shown": f"any_value(currency) {BILL}",
    "Cost share": "1",
    "Discount": f"sum(list_cost) - sum(contracted_cost) {BILL}",
    "Discount share": f"1 - sum(contracted_cost) / sum(list_cost) {BILL}",
    "Markup": f"sum(cost) - sum(contracted_cost) {BILL}",
    "Billed tokens": f"sum(quantity) {BILL} WHERE {COUNTS}",
    "Cost per million tokens": f"1000000 * sum(cost) / sum(quantity) FILTER (pricing_status <> 'unpriced') {BILL} WHERE {COUNTS}",
    "Cost per request": f"(SELECT sum(cost) {BILL}) / (SELECT sum(requests) {USAGE})",
    "Fixed cost": f"sum(cost) {BILL} WHERE {FIXED}",
    "Idle cost": f"sum(cost) {BILL} WHERE {IDLE}",
    "Idle share": f"sum(cost) FILTER ({IDLE}) / sum(cost) {BILL} WHERE {FIXED}",
    "Usage cost": f"sum(cost) {BILL} WHERE NOT {FIXED}",
    "Corrections": f"sum(cost) {BILL} WHERE charge_class = 'Correction'",
    "Cost without corrections": f"sum(cost) {BILL} WHERE charge_class IS NULL",
    "Cost month to date": f"sum(cost) {BILL} WHERE {TO_DATE}",
    "Cost previous month to date": f"sum(cost) {BILL} WHERE {BEFORE}",
    "Change on previous month": f"sum(cost) FILTER ({TO_DATE}) / sum(cost) FILTER ({BEFORE}) - 1 {BILL}",
    "Projected cost of the month": f"sum(cost) / 6 * 31 {BILL} WHERE {TO_DATE}",
    "Fallback cost": f"sum(cost) {BILL} WHERE pricing_status = 'fallback'",
    "Unpriced tokens": f"sum(quantity) {BILL} WHERE pricing_status = 'unpriced' AND {COUNTS}",
    "Unpriced quantity": "NULL",  # of several meters
    "Unallocated cost": f"sum(cost) {BILL} WHERE cost_center = 'UNALLOCATED'",
    "Estimated cost": f"sum(cost) {BILL} WHERE usage_source = 'estimated'",
    "Events": "sum(parsed) FROM daily_quality",
    "Accepted requests": "sum(accepted) FROM daily_quality",
    "Duplicates": "sum(duplicates) FROM daily_quality",
    "Conflicts": "sum(conflicts) FROM daily_quality",
    "No usage": "sum(no_usage) FROM daily_quality",
    "Unpriced": "sum(unpriced) FROM daily_quality",
    "Unallocated": "sum(unallocated) FROM daily_quality",
    "Estimated": "sum(estimated) FROM daily_quality",
    "Unattributed": "sum(unattributed) FROM daily_quality",
    "Lowest coverage": "min(coverage) FROM daily_quality",
    "Last usage date": "max(usage_date) FROM daily_quality",
    "Days since last usage date": "date_diff('day', max(usage_date), current_date) FROM daily_quality",
    "Requests": f"sum(requests) {USAGE}",
    "Unpriced requests": f"sum(requests) {USAGE} WHERE pricing_status = 'unpriced'",
    "Requests without usage": f"sum(requests) {USAGE} WHERE pricing_status = 'no_usage'",
    "Unallocated requests": f"sum(requests) {USAGE} WHERE cost_center = 'UNALLOCATED'",
    "Prompt tokens": f"sum(prompt_tokens) {USAGE}",
    "Cached tokens": f"sum(cached_tokens) {USAGE}",
    "Cache write tokens": f"sum(cache_write_tokens) {USAGE}",
    "Completion tokens": f"sum(completion_tokens) {USAGE}",
    "Reasoning tokens": f"sum(reasoning_tokens) {USAGE}",
    "Total tokens": f"sum(total_tokens) {USAGE}",
    "Token share": "1",
    "Cached share": f"sum(cached_tokens) / sum(prompt_tokens) {USAGE}",
    "Requests per hour": f"count(*) {HOURS}",
    "Tokens per hour": f"sum(total_tokens) {HOURS}",
    "Prompt tokens per hour": f"sum(prompt_tokens) {HOURS}",
    "Completion tokens per hour": f"sum(completion_tokens) {HOURS}",
    "Failed requests": f"count(*) {HOURS} WHERE status_code >= 400",
    "Throttled requests": f"count(*) {HOURS} WHERE status_code = 429",
    "Error rate": f"count(*) FILTER (status_code >= 400) / count(*) {HOURS}",
    "Average lag": f"sum({LAG}) / 1000000 / count(*) {HOURS}",
    "Longest lag": f"max({LAG}) / 1000000 {HOURS}",
    "Last event": f"max(enqueued_at) {HOURS}",
    "Quarantined records": "count(*) FROM quarantine",
    "Quarantined bytes": "sum(bytes) FROM quarantine",
}
"""What each measure is, in SQL over the published tables."""


@pytest.fixture
def every_kind(bill: tuple[Path, list[str]], tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A copy of the file in which every column has values of its own, and every kind of line and request is there."""
    kinds = [
        "'cached_input' AS meter, 'fallback' AS pricing_status",
        "'provisioned_capacity' AS meter",
        "'idle_capacity' AS meter, 'UNALLOCATED' AS cost_center",
        "'unused_reservation' AS meter",
        "'input' AS meter, 'unpriced' AS pricing_status, NULL AS cost, NULL AS list_cost, NULL AS contracted_cost",
        "'Correction' AS charge_class, '2026-11' AS billing_period",
        "'estimated' AS usage_source",
        "DATE '2026-08-31' AS usage_date",
        "DATE '2026-09-03' AS usage_date",
        "DATE '2026-09-07' AS usage_date",
        "DATE '2026-09-30' AS usage_date",
        "DATE '2026-10-06' AS usage_date",
    ]
    with duckdb.connect(str(shutil.copy(bill[0], tmp_path / "every_kind.duckdb"))) as db:
        db.execute("CREATE TABLE line AS SELECT * FROM daily_billing WHERE price_id = 'in-1' LIMIT 1; UPDATE daily_billing SET charge_class = NULL")
        for n, kind in enumerate(kinds, 1):
            amounts = ", ".join(f"CAST({money} * 1.0{n} AS DECIMAL(38,15)) AS {money}" for money in MONEY if money not in kind)
            replaced = ", ".join(
                part for part in (kind, f"CAST({n}000003 AS {db.table('line').select('quantity').types[0]}) AS quantity", amounts) if part
            )
            db.execute(f"INSERT INTO daily_billing SELECT * REPLACE ({replaced}) FROM line")
        for t, table in enumerate(("daily_usage", "daily_quality", "capture_files", "quarantine"), 1):
            counts = [column.name for column in tables.PUBLISHED[table] if column.type == "BIGINT" and column.name != "events"]
            db.execute(f"UPDATE {table} SET {', '.join(f'{name} = coalesce({name}, 0) + {1000 * t + 70 * n}' for n, name in enumerate(counts))}")
        db.execute("UPDATE capture_files SET events = parsed + quarantined")
        for status, center, requests in (("unpriced", "CC-1", 30), ("no_usage", "UNALLOCATED", 500), ("no_usage", "CC-1", 9)):
            replaced = f"'{status}' AS pricing_status, '{center}' AS cost_center, {requests} AS requests"
            db.execute(f"INSERT INTO daily_usage SELECT * REPLACE ({replaced}) FROM daily_usage LIMIT 1")
        db.execute("INSERT INTO quarantine SELECT q.* FROM (FROM quarantine LIMIT 1) q, range(2)")
        db.execute("INSERT INTO capture_files SELECT f.* REPLACE ('unreadable' AS status) FROM (FROM capture_files LIMIT 1) f, range(4)")
        for status, times in ((429, 6), (500, 1), (302, 3)):
            replaced = f"{status} AS status_code, enqueued_at + INTERVAL 1 HOUR AS enqueued_at"
            db.execute(f"INSERT INTO enriched_usage SELECT e.* REPLACE ({replaced}) FROM (FROM enriched_usage LIMIT 1) e, range({times})")
        yield db


def test_every_measure_is_what_the_published_columns_say(every_kind: duckdb.DuckDBPyConnection) -> None:
    assert EXPECTED.keys() == PROJECT.measures.keys()
    of = measures(every_kind)
    seen: dict[str, set[str]] = {}
    for name, select in EXPECTED.items():
        [[expected]] = every_kind.execute(f"SELECT {select}").fetchall()
        found = of[name]
        assert found is not None or select == "NULL", name
        if isinstance(expected, float):
            assert float(found) == pytest.approx(expected, rel=1e-12), name
        else:
            assert found == expected, name
        seen.setdefault(str(expected), set()).add(name)
    # a measure that were another one would be found out
    alike = [{"Cost", "Cost unrounded"}, {"Cost share", "Token share", "Currencies"}]
    assert [names for names in seen.values() if len(names) > 1 and names not in alike] == []


def test_costs_in_several_currencies_are_not_added_up(every_kind: duckdb.DuckDBPyConnection) -> None:
    """Not one measure of money shows a number, nor a part of a chart that has one currency only, until a currency is chosen."""
    of = measures(every_kind)
    assert of["Currency shown"] == "USD"
    every_kind.execute("UPDATE daily_billing SET currency = 'EUR' WHERE meter IN ('provisioned_capacity', 'output') OR charge_class IS NOT NULL")
    money = [name for name, select in EXPECTED.items() if re.search(r"sum\(\w*cost\)", select)]
    assert len(money) > 20 and of["Currency shown"] == "several: choose one"
    assert {name: of[name] for name in money if of[name] is not None} == {}
    capacity = {"Daily billing": ["meter = 'provisioned_capacity'"]}
    assert of.at("Cost", capacity) is of.at("Fixed cost", capacity) is None
    chosen = measures(every_kind, {"Daily billing": ["currency = 'EUR'"]})
    [[expected]] = every_kind.execute(f"SELECT sum(cost) {BILL} WHERE currency = 'EUR'").fetchall()
    assert chosen["Currency shown"] == "EUR" and chosen["Cost"] == expected and chosen.at("Cost", capacity) == chosen["Fixed cost"] > 0


def test_a_month_is_not_compared_with_one_in_another_currency(every_kind: duckdb.DuckDBPyConnection) -> None:
    every_kind.execute("UPDATE daily_billing SET currency = 'EUR' WHERE usage_date < '2026-10-01'")
    of = measures(every_kind, {"Daily billing": ["usage_date >= '2026-10-01'"], "Date": ["day >= '2026-10-01'"]})
    assert of["Currency shown"] == "USD" and of["Cost month to date"] > 0
    assert of["Cost previous month to date"] is of["Change on previous month"] is None


def test_the_month_to_date_is_the_same_month_for_everybody(every_kind: duckdb.DuckDBPyConnection) -> None:
    """Who has used nothing since September has no cost in October, and no projection of September's; capture dates after the last bill count not."""
    every_kind.execute("UPDATE daily_billing SET cost_center = 'CC-OLD' WHERE usage_date BETWEEN '2026-09-01' AND '2026-09-03'")
    every_kind.execute("INSERT INTO capture_files SELECT * REPLACE (DATE '2026-11-01' AS capture_date) FROM capture_files LIMIT 1")
    of, old = measures(every_kind), {"Daily billing": ["cost_center = 'CC-OLD'"]}
    assert of["Cost month to date"] > 0 and of.at("Cost", old) == of.at("Cost previous month to date", old) > 0
    assert of.at("Cost month to date", old) is of.at("Projected cost of the month", old) is None
    assert of.at("Change on previous month", old) == -1
    late = measures(every_kind, {"Daily billing": ["usage_date >= '2026-10-05'"], "Date": ["day >= '2026-10-05'"]})
    assert late.at("Cost", old) is None and late.at("Cost previous month to date", old) == of.at("Cost", old), "days before the slicer's count"


def test_usage_without_a_price_is_counted_on_its_own_meter(every_kind: duckdb.DuckDBPyConnection) -> None:
    every_kind.execute(
        "INSERT INTO daily_billing SELECT * REPLACE ('image/1024x1024' AS meter, 7 AS quantity) FROM daily_billing WHERE pricing_status = 'unpriced'"
    )
    assert measures(every_kind).at("Unpriced quantity", {"Daily billing": ["meter = 'image/1024x1024'"]}) == 7


def test_days_since_the_last_bill_do_not_depend_on_the_slicers(every_kind: duckdb.DuckDBPyConnection) -> None:
    days = measures(every_kind)["Days since last usage date"]
    assert measures(every_kind, {"Daily quality": ["usage_date = '2026-10-04'"]})["Days since last usage date"] == days > 0
    every_kind.execute("DELETE FROM daily_quality")  # what a cost centre reader sees of it
    assert measures(every_kind)["Days since last usage date"] is None


def test_amounts_below_zero_and_above_a_billion_are_exact() -> None:
    amounts = ["-0.000000000000001", "-0.07", "0.000000999999999", "1234567890123.000000000000001", "-1.000001"]
    with duckdb.connect() as db:
        db.execute("CREATE TABLE daily_billing AS SELECT CAST(unnest(?) AS DECIMAL(38,15)) AS cost, 'USD' AS currency", [amounts])
        assert measures(db)["Cost"] == sum(map(Decimal, amounts))
        least, most = db.execute(f"SELECT min(x), max(x) FROM (SELECT {remainder('cost')} AS x FROM daily_billing)").fetchall()[0]
        assert least >= 0 and most < 10**9


# --- queries -------------------------------------------------------------------------------------------------------------------------


Sources = dict[str, tuple[duckdb.DuckDBPyConnection, dict[str, Any]]]


@pytest.fixture
def sources(bill: tuple[Path, list[str]], every_kind: duckdb.DuckDBPyConnection) -> Sources:
    """By source: the published tables it stands for, and the values for the model's queries."""
    root = bill[0].parent

    def blobs(url: str) -> Table:
        folder = {"https://lake": root / "lake", "https://reference": root / "reference"}[url]
        found = files(str(folder))
        names = (f"{row['Folder Path']}{row['Name']}".removeprefix(f"{folder}/") for row in found.rows)
        lake = "some/where/" if url == "https://lake" else ""
        return Table(found.columns, ({**row, "Name": lake + name, "Folder Path": url} for row, name in zip(found.rows, names, strict=True)))

    def odbc(connection: str, sql: str) -> Table:
        found = every_kind.sql(sql)
        assert set(found.types) == {"VARCHAR"}, "exact, and the same in every culture"
        return Table(found.columns, (dict(zip(found.columns, row, strict=True)) for row in found.fetchall()))

    def mirror(endpoint: str, database: str) -> Table:
        fields = documents.DAILY_BILLING.fields
        found = every_kind.sql(f"SELECT {', '.join(fields.values())} FROM daily_billing").fetchall()
        # a mirror has no column for a field that is null in every document
        known = [name for n, name in enumerate(fields) if any(row[n] is not None for row in found)]
        lines = Table(known, ({name: value for name, value in zip(fields, row, strict=True) if name in known} for row in found))
        return Table(["Item", "Data"], [{"Item": "aoai-usage_statements", "Data": None}, {"Item": "aoai-usage_daily-billing", "Data": lines}])

    file = duckdb.connect(str(bill[0]), read_only=True)
    lake = {"LakeContainer": "https://lake", "LakePath": "some/where", "ReferenceContainer": "https://reference", "AzureStorage.Blobs": blobs}
    on_disk = {"ReferenceContainer": str(root / "reference")}
    given = {
        "Lake": (file, lake),
        "Folder": (file, {"LakePath": str(root / "lake")} | on_disk),
        "DuckDB": (every_kind, {"Odbc.Query": odbc} | on_disk),
        "Cosmos DB": (every_kind, lake | {"Sql.Database": mirror}),
    }
    values = {"RangeStart": dt.datetime(2026, 8, 1), "RangeEnd": dt.datetime(2026, 12, 1)}
    return {source: (db, {"Source": source} | values | own) for source, (db, own) in given.items()}


def test_the_queries_give_the_published_tables_from_every_source(sources: Sources) -> None:
    """Run by an interpreter of ours: each column, each amount to the last digit, each sum of the hours and of the capture files."""
    for source, (db, values) in sources.items():
        queries = Queries(PROJECT, **values)
        for table, name in FACTS.items():
            found = queries[table]
            if source == "Cosmos DB" and table != "Daily billing":
                assert not found.rows
                continue
            assert set(found.columns) == {column.properties["sourceColumn"] for column in PROJECT.tables[table].of("column")}
            plain = [column for column in found.columns if column in published(table).keys() - {"bytes", "records", "parsed", "quarantined"}]
            made = SUMMED.get(table, {})
            select = [f'"{column}"' for column in plain if column not in made] + [f"{sql} AS {column}" for column, sql in made.items()]
            select += [column for column in MONEY if table == "Daily billing"]
            expected = db.sql(f"SELECT {', '.join(select)} FROM {name} {'GROUP BY ALL' if made else ''}")
            rows = [[_amount(row, column) if column in MONEY else row[column] for column in expected.columns] for row in found.rows]
            assert sorted(map(_said, rows)) == sorted(map(_said, expected.fetchall())) != [], (source, table)


def _said(row: Iterable[Any]) -> str:
    """A row as text in which equal decimals are equal."""
    return repr([value.normalize() if isinstance(value, Decimal) else value for value in row])


def _amount(row: Mapping[str, Any], name: str) -> Decimal | None:
    if row[f"{name}_millionths"] is None:
        return None
    assert 0 <= row[f"{name}_remainder"] < 10**9
    return Decimal(row[f"{name}_millionths"]).scaleb(-6) + Decimal(row[f"{name}_remainder"]).scaleb(-15)


SUMMED = {
    "Hourly usage": {
        "hour": "hour(event_time)",
        "requests": "count(*)",
        "failed": "count(*) FILTER (status_code >= 400)",
        "throttled": "count(*) FILTER (status_code = 429)",
        "prompt_tokens": "CAST(sum(prompt_tokens) AS BIGINT)",
        "completion_tokens": "CAST(sum(completion_tokens) AS BIGINT)",
        "total_tokens": "CAST(sum(total_tokens) AS BIGINT)",
        "lag_seconds": f"CAST(sum({LAG}) AS DECIMAL(20,0)) * 0.000001",
        "longest_lag_seconds": f"CAST(max({LAG}) AS DECIMAL(20,0)) * 0.000001",
        "last_enqueued_at": "max(enqueued_at)",
    },
    "Capture files": {
        "file": "CASE status WHEN 'unreadable' THEN blob END",
        "files": "count(*)",
        **{name: f"CAST(sum({name}) AS BIGINT)" for name in ("bytes", "records", "parsed", "quarantined")},
    },
}
"""What the queries add up, in SQL."""


def test_a_partition_ends_before_the_day_of_its_end(sources: Sources) -> None:
    for source, (_, values) in sources.items():
        before, on = (
            Queries(PROJECT, **values | {"RangeStart": first, "RangeEnd": first + dt.timedelta(1)})
            for first in (dt.datetime(2026, 10, 4), dt.datetime(2026, 10, 5))
        )
        for table in FACTS if source != "Cosmos DB" else ["Daily billing"]:
            assert not before[table].rows and on[table].rows, (source, table)


def test_a_partition_is_loaded_again_when_a_day_was_replaced(sources: Sources, root: Path) -> None:
    for source in ("Lake", "Folder"):
        values = sources[source][1]
        day = root / "lake/daily_billing/usage_date=2026-10-05/data.parquet"
        before, again = (Queries(PROJECT, **values) for _ in range(2))
        assert before["Daily billing: polling"] == again["Daily billing: polling"]
        usage = before["Daily usage: polling"]
        os.utime(day, (day.stat().st_mtime + 5,) * 2)
        after = Queries(PROJECT, **values)
        assert after["Daily billing: polling"] != before["Daily billing: polling"] and after["Daily usage: polling"] == usage


def test_a_wrong_path_is_no_empty_bill(sources: Sources, root: Path) -> None:
    for source, path in (("Lake", "-"), ("Folder", str(root / "reference"))):
        with pytest.raises(RuntimeError, match="No lake"):
            Queries(PROJECT, **sources[source][1] | {"LakePath": path})["Daily billing"]


def test_readers_are_read_as_people_write_them(sources: Sources, root: Path) -> None:
    assert [Queries(PROJECT, **values)["Readers"].rows for _, values in sources.values()] == [[]] * 4
    (root / "reference/cost_center_readers.csv").write_text(
        "\ufeffuser_principal_name,cost_center\n ana@contoso.com , CC-1\nana@contoso.com,CC-1\nbo@contoso.com,*\n"
    )
    for _, values in sources.values():
        assert [list(row.values()) for row in Queries(PROJECT, **values)["Readers"].rows] == [["ana@contoso.com", "CC-1"], ["bo@contoso.com", "*"]]


def visible(user: str, readers: list[dict[str, str]], centers: Iterable[str]) -> set[str]:
    """The cost centres whose lines the role leaves a user, by the DAX of its filter on Payer."""

    def value(node: Any, center: str) -> str:
        match type(node).__name__:
            case "FunctionExpression":
                return {"USERPRINCIPALNAME": user}[node.function_name()].lower()
            case "ColumnExpression":
                return {("'Payer'", "[Cost centre]"): center}[node.table.text, node.column.text].lower()
        return node.value.text.strip('"').lower()

    def holds(node: Any, center: str) -> bool:
        if type(node).__name__ == "LogicalExpression":
            return {"||": any, "&&": all}[node.operator.text](holds(side, center) for side in (node.left, node.right))
        assert node.function_name() == "CONTAINS" and node.args[0].name.text == "'Readers'"
        columns = [PROJECT.columns["Readers", column.column.text.strip("[]")].properties["sourceColumn"] for column in node.args[1::2]]
        wanted = [value(wanted, center) for wanted in node.args[2::2]]
        return any([row[column].lower() for column in columns] == wanted for row in readers)

    [rule] = [dax.to_ast(found.value) for found in PROJECT.of("role")["Cost centre reader"].of("tablePermission") if found.name == "Payer"]
    return {center for center in centers if holds(rule, center)}


def test_who_is_not_in_the_file_of_readers_sees_nothing(sources: Sources, root: Path) -> None:
    centers = {"CC-1", "CC-2", "UNALLOCATED"}
    (root / "reference/cost_center_readers.csv").write_text(
        "user_principal_name,cost_center\nAna@contoso.com,cc-1\nbo@contoso.com,*\n,CC-2\nclea@contoso.com,\n"
    )
    readers = Queries(PROJECT, **sources["Lake"][1])["Readers"].rows
    seen = {user: visible(user, readers, centers) for user in ("ana@contoso.com", "bo@contoso.com", "clea@contoso.com", "dan@contoso.com")}
    assert seen == {"ana@contoso.com": {"CC-1"}, "bo@contoso.com": centers, "clea@contoso.com": set(), "dan@contoso.com": set()}
    assert visible("ana@contoso.com", [], centers) == set()


def test_keys_of_different_rows_differ() -> None:
    key = Queries(PROJECT)["Key"]
    rows = [["a", "b"], ["a|b", ""], ["", "a|b"], ["a", None], ["a", ""], [None, "a"], ["a\\", "b"], ["a", "\\b"], ["a\\|b", ""], ["\\0", "a"]]
    assert len({key(row) for row in rows}) == len(rows)


def test_amounts_are_split_exactly() -> None:
    queries = Queries(PROJECT)
    for text in ("-0.000000000000001", "-0.07", "0.000000999999999", "1234567890123.000000000000001", "-1.000001", "0"):
        for amount in (Decimal(text), text):
            millionths, rest = queries["Millionths"](amount), queries["Remainder"](amount)
            assert Decimal(millionths).scaleb(-6) + Decimal(rest).scaleb(-15) == Decimal(text) and 0 <= rest < 10**9
    assert queries["Millionths"](None) is queries["Remainder"](None) is None


# --- report --------------------------------------------------------------------------------------------------------------------------


def test_visuals_lie_on_their_page_and_apart() -> None:
    for page in PROJECT.report.glob("definition/pages/*/page.json"):
        size = json.loads(page.read_text())
        boxes = {}
        for file in page.parent.glob("visuals/*/visual.json"):
            visual = json.loads(file.read_text())
            assert visual["name"] == file.parent.name
            box = visual["position"]
            boxes[visual["name"]] = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        for name, (left, top, right, bottom) in boxes.items():
            assert 0 <= left < right <= size["width"] and 0 <= top < bottom <= size["height"], (page, name)
            over = [n for n, other in boxes.items() if n != name and left < other[2] and other[0] < right and top < other[3] and other[1] < bottom]
            assert not over, (page, name, over)


def test_every_visual_shows_what_the_model_has() -> None:
    visuals = list(PROJECT.visuals())
    assert len(visuals) > 100
    for visual in visuals:
        assert visual.fields or visual.type == "textbox", visual.file
        if visual.type == "card":
            assert [visual.file.parent.name] == [f"card-{name.lower().replace(' ', '-')}" for *_, name in visual.fields], visual.file
        for role, what, table, name in visual.fields:
            if what == "Measure":
                assert name in {m.name for m in PROJECT.tables[table].of("measure")}, visual.file
            else:
                assert what == "Column" and (table, name) in PROJECT.columns, visual.file
                assert "isHidden" not in PROJECT.columns[table, name].properties, visual.file
            if role in ("Y", "Y2"):
                assert what == "Measure", visual.file


def test_pages_are_there_and_have_what_they_promise() -> None:
    pages = json.loads((PROJECT.report / "definition/pages/pages.json").read_text())["pageOrder"]
    assert set(pages) == {file.parent.name for file in PROJECT.report.glob("definition/pages/*/page.json")}
    text = (ROOT / "docs/power-bi.md").read_text()
    for page in pages:
        title = json.loads((PROJECT.report / f"definition/pages/{page}/page.json").read_text())["displayName"]
        assert f"| **{title}** |" in text
        shown = [v for v in PROJECT.visuals() if v.page == page]
        assert any(v.type == "slicer" for v in shown) and any(v.type == "card" for v in shown)
        if any("cost" in name.lower() and name in PROJECT.measures for v in shown for *_, name in v.fields):
            assert {"Currency shown", "Currency"} <= {name for v in shown for *_, name in v.fields}, "costs of one currency, and it is named"
    shown = {name for visual in PROJECT.visuals() for *_, name in visual.fields}
    hidden = PROJECT.measures.keys() - shown
    assert hidden <= {
        "Captured bytes", "Captured records", "Capture files read", "Completion tokens per hour", "Contracted cost", "Cost previous month to date",
        "Cost without corrections", "Events", "Last usage date", "Prompt tokens per hour", "Quarantine rate", "Requests without usage",
        "Unallocated requests", "Unpriced requests", "Cached tokens", "Cache write tokens", "Currencies", "Unpriced tokens",
    }  # fmt: skip


def test_every_parameter_is_documented() -> None:
    text = (ROOT / "docs/power-bi.md").read_text()
    parameters = [name for name, expression in PROJECT.expressions.items() if "IsParameterQuery" in expression.value]
    assert len(parameters) == 10
    for name in parameters:
        assert f"| `{name}` |" in text


# --- Microsoft's own tools --------------------------------------------------------------------------------------------------------------


def tool(name: str) -> Path:
    found = TOOLS / name
    if not found.exists():
        pytest.fail("the Power BI tools are not installed: run `make test`, which installs them")
    return found


def node(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    program = ROOT / ".venv/bin/node"
    return subprocess.run([str(program) if program.exists() else "node", *map(str, command)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str, str, str], Project]:
    """A copy of the project with a text replaced in a file."""

    def make(file: str, old: str, new: str) -> Project:
        folder = tmp_path / "project"
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
        return Project(folder)

    return make


@pytest.fixture(scope="session")
def read_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Project], subprocess.CompletedProcess[str]]:
    if not (shutil.which("mcs") and shutil.which("mono")):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("mono is not installed: apt-get install mono-mcs (see .ci/run)")
    libraries = tool("python_tabular/pytabular/dll")
    program = tmp_path_factory.mktemp("mono") / "read_model.exe"
    names = ("Microsoft.AnalysisServices.Tabular", "Microsoft.AnalysisServices.Core", "Microsoft.AnalysisServices")
    source = Path(__file__).parent / "data/power_bi/read_model.cs"
    subprocess.run(["mcs", f"-out:{program}", *(f"-r:{libraries / name}.dll" for name in names), str(source)], check=True, timeout=120)

    def read(project: Project) -> subprocess.CompletedProcess[str]:
        command = ["mono", str(program), str(project.model / "definition")]
        return subprocess.run(command, env=os.environ | {"MONO_PATH": str(libraries)}, capture_output=True, text=True, timeout=120)

    return read


def understood(project: Project) -> set[tuple[str, ...]]:
    """What `read_model.cs` prints of the project, as our own reader sees it."""
    types = {"boolean": "Boolean", "string": "String", "int64": "Int64", "double": "Double", "dateTime": "DateTime"}
    found: set[tuple[str, ...]] = {(what, name) for what in ("table", "expression", "role") for name in project.of(what)}
    found |= {("column", table, name, types[column.properties["dataType"]]) for (table, name), column in project.columns.items()}
    found |= {("measure", table.name, measure.name) for table in project.tables.values() for measure in table.of("measure")}
    found |= {("policy", table.name) for table in project.tables.values() if table.of("refreshPolicy")}
    ends = [(o.properties["fromColumn"], o.properties["toColumn"]) for o in project.of("relationship").values()]
    return found | {("relationship", *(re.match(r"'[^']+'|\w+", end)[0].strip("'") for end in pair)) for pair in ends}


@pytest.mark.slow
def test_microsofts_library_reads_the_model_as_we_do(read_model: Callable[[Project], subprocess.CompletedProcess[str]]) -> None:
    read = read_model(PROJECT)
    assert read.returncode == 0, read.stderr
    assert {tuple(line.split("\t")) for line in read.stdout.splitlines()} == understood(PROJECT)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "fault"), [
    ("relationships.tmdl", "toColumn: Meter.Meter", "toColumn: Meter.Metre", "ToColumn"),
    ("tables/Payer.tmdl", "dataType: string", "dataType: text", "dataType"),
    ("tables/Date.tmdl", "summarizeBy: none", "sumarizeBy: none", "sumarizeBy"),
    ("tables/Meter.tmdl", "\tcolumn Kind", "\t  column Kind", "ndent"),
])  # fmt: skip
def test_microsofts_library_refuses_a_broken_model(read_model: Any, copy: Any, file: str, old: str, new: str, fault: str) -> None:
    read = read_model(copy(f"aoai-usage.SemanticModel/definition/{file}", old, new))
    assert read.returncode == 1 and fault in read.stderr, read.stderr


def m_faults(expressions: dict[str, str]) -> dict[str, str]:
    tool("node_modules/@microsoft/powerquery-parser")
    read = node(Path(__file__).parent / "data/power_bi/read_m.js", TOOLS, input=json.dumps(expressions))
    assert read.returncode == 0, read.stderr
    return json.loads(read.stdout)


@pytest.mark.slow
def test_microsofts_parser_reads_every_m_expression() -> None:
    expressions = PROJECT.m()
    assert len(expressions) > 30 and m_faults(expressions) == {}
    broken = {name: f"{text})" for name, text in expressions.items()}
    assert m_faults(broken).keys() == broken.keys()


def validated(project: Project) -> dict[str, Any]:
    program = tool("node_modules/@microsoft/powerbi-report-authoring-cli/dist/cli.js")
    return json.loads(node(program, "validate", project.report, "--no-schema").stdout)["data"]


@pytest.mark.slow
def test_microsofts_validator_accepts_the_report() -> None:
    assert (found := validated(PROJECT))["result"] == "succeeded", found


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "fault"), [
    ('"visualType": "pieChart"', '"visualType": "cakeChart"', "PBIR_VISUAL_TYPE_UNKNOWN"),
    ('"Category": {', '"Categories": {', "PBIR_"),
    ('"name": "cost-by-model"', '"nom": "cost-by-model"', "PBIR_"),
])  # fmt: skip
def test_microsofts_validator_refuses_a_broken_report(copy: Any, old: str, new: str, fault: str) -> None:
    found = validated(copy("aoai-usage.Report/definition/pages/costs/visuals/cost-by-model/visual.json", old, new))
    assert found["result"] != "succeeded" and any(code.startswith(fault) for code in found["diagnostics"]), found
