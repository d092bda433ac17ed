"""Which reference row applies: the one in force on the usage date with the most exact matches. Set-based, over distinct keys only."""

from collections.abc import Iterable, Sequence
from decimal import Decimal

import duckdb
import pyarrow as pa

from aoai_usage_pipeline.lake.engine import literal
from aoai_usage_pipeline.rating.overlay import PLACES, Overlay, PriceOverflow, overlaid
from aoai_usage_pipeline.reference.checks import ONE_BY_ONE
from aoai_usage_pipeline.reference.files import CONTRACT_PRICES, COST_CENTERS, DEPLOYMENTS, EXCHANGE_RATES, MARKUPS, PRICE_BOOK, Reference, Row, Spec

TOKEN_METERS = {
    "input": """prompt_tokens - coalesce(cached_tokens, 0) - coalesce(cache_write_tokens, 0)
        - coalesce(audio_prompt_tokens, 0) + coalesce(cached_audio_tokens, 0)
        - coalesce(image_prompt_tokens, 0) + coalesce(cached_image_tokens, 0)""",
    "cached_input": "cached_tokens - coalesce(cached_audio_tokens, 0) - coalesce(cached_image_tokens, 0)",
    "cache_write": "cache_write_tokens",
    "audio_input": "audio_prompt_tokens - coalesce(cached_audio_tokens, 0)",
    "cached_audio_input": "cached_audio_tokens",
    "image_input": "image_prompt_tokens - coalesce(cached_image_tokens, 0)",
    "cached_image_input": "cached_image_tokens",
    "output": "completion_tokens - coalesce(audio_completion_tokens, 0) - coalesce(image_completion_tokens, 0)",
    "audio_output": "audio_completion_tokens",
    "image_output": "image_completion_tokens",
}
"""How many tokens of a request each meter counts. These meters are disjoint and add up to prompt + completion tokens."""

NO_TOKENS = "coalesce(prompt_tokens, completion_tokens) IS NULL"
"""SQL: that a request reports no tokens."""

INSTEAD_OF_TOKENS = {"image": "images", "audio_seconds": "audio_seconds", "characters": "characters"}
"""Meters of calls that report no tokens, with what they count: where tokens are reported, they are what is billed."""

OTHER_METERS = {meter: f"CASE WHEN {NO_TOKENS} THEN {count} END" for meter, count in INSTEAD_OF_TOKENS.items()} | {
    "web_search_calls": "web_search_calls",
    "file_search_calls": "file_search_calls",
    "code_interpreter_sessions": "code_interpreter_sessions",
}
"""How much of a request each of the meters counts that are not tokens."""

METER_QUANTITIES = TOKEN_METERS | OTHER_METERS

METER_DETAILS = {
    "cached_input": "cached_tokens",
    "cache_write": "cache_write_tokens",
    "audio_input": "audio_prompt_tokens",
    "cached_audio_input": "cached_audio_tokens",
    "image_input": "image_prompt_tokens",
    "cached_image_input": "cached_image_tokens",
    "audio_output": "audio_completion_tokens",
    "image_output": "image_completion_tokens",
    "image": "images",
    "audio_seconds": "audio_seconds",
    "characters": "characters",
    "web_search_calls": "web_search_calls",
    "file_search_calls": "file_search_calls",
    "code_interpreter_sessions": "code_interpreter_sessions",
}
"""The column without which a meter has no quantity; meters that are not named here may always have one."""

LONG_CONTEXT_TOKENS = 272_000
"""Above this many prompt tokens a whole request is in the long context band of models that have one (Azure price list)."""

PRICE_KEY = ("usage_date", *PRICE_BOOK.matches, "image_kind")
"""What decides the price of a meter."""

_FITS = """(r.effective_from IS NULL OR r.effective_from <= k.usage_date) AND (r.effective_to IS NULL OR k.usage_date < r.effective_to)
{conditions}"""
_BEST = f"""
CREATE OR REPLACE TABLE {{target}} AS
SELECT k.*, arg_max(struct_pack({{gives}}), {{exact}}) FILTER (r.exact IS NOT NULL) AS best
FROM (SELECT DISTINCT {{keys}} FROM {{source}}) AS k LEFT JOIN {{rows}} AS r
ON {_FITS}
GROUP BY ALL
"""
_OF_METER = "split_part(r.meter, '/', 1) = k.meter AND starts_with(concat_ws('/', k.meter, k.image_kind, ''), r.meter || '/')"
"""SQL: that a row `r` is for the meter of a key `k`, and one for images for any or their own size, and any or their own quality."""

_MOST_EXACT_OF_METER = "r.exact + 100 * length(r.meter)"


_OF_ANY_METER = f"(r.meter IS NULL OR ({_OF_METER}))"
_MOST_EXACT_OVERLAY = "CASE WHEN r.price_id IS NULL THEN 0 ELSE 10000 END + 100 * r.exact + coalesce(length(r.meter), 0)"
"""SQL: how exact a row of a contract or markup is: one for a price before any pattern, and of equal ones that which says more of the image."""


def load_reference(db: duckdb.DuckDBPyConnection, reference: Reference) -> None:
    """Put the reference rows into tables of a connection, each named as its file."""
    for spec, rows in (
        (PRICE_BOOK, reference.price_book),
        (DEPLOYMENTS, reference.deployments),
        (COST_CENTERS, reference.cost_centers),
        (CONTRACT_PRICES, reference.contract_prices),
        (MARKUPS, reference.markups),
        (EXCHANGE_RATES, reference.exchange_rates),
    ):
        _load(db, spec.name.removesuffix(".csv"), spec, rows)
    db.execute("ALTER TABLE price_book ALTER unit_price TYPE DECIMAL(18,9)")
    db.execute("ALTER TABLE price_book ALTER unit_tokens TYPE BIGINT")


def _load(db: duckdb.DuckDBPyConnection, table: str, spec: Spec, rows: Sequence[Row]) -> None:
    columns = {name: pa.array([row.values[name] for row in rows], pa.string()) for name in spec.columns[:-2]}
    columns["line"] = pa.array([row.line for row in rows], pa.int64())
    columns["exact"] = pa.array([sum(row.values[name] is not None for name in spec.matches) for row in rows], pa.int32())
    for name in ("effective_from", "effective_to"):
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.date32())
    loaded = pa.table(columns)  # noqa: F841 - read by name in the next statement
    db.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM loaded")


def _best(
    target: str, source: str, rows: str, keys: Iterable[str], matches: Iterable[str], gives: Iterable[str], extra: str = "", exact: str = "r.exact"
) -> str:
    return _BEST.format(
        target=target,
        source=source,
        rows=rows,
        keys=", ".join(keys),
        gives=", ".join(f"{g} := r.{g}" for g in gives),
        conditions=_conditions(matches) + extra,
        exact=exact,
    )


def _conditions(matches: Iterable[str]) -> str:
    return "\n".join(f"AND (r.{name} IS NULL OR r.{name} = k.{name})" for name in matches)


def _but_meter(spec: Spec) -> list[str]:
    return [name for name in spec.matches if name != "meter"]


def fitting(db: duckdb.DuckDBPyConnection, spec: Spec, source: str) -> list[int]:
    """The lines in its file of all rows that fit the one row of `source`, the most exact one, which applies, first.

    `source` has the columns that the file matches, `usage_date`, and for prices `meter` and `image_kind`.
    """
    conditions, exact = _conditions(spec.matches), "r.exact"
    if spec is PRICE_BOOK:
        conditions, exact = f"{conditions}\nAND {_OF_METER}", _MOST_EXACT_OF_METER
    elif spec in (CONTRACT_PRICES, MARKUPS):
        conditions, exact = f"{_conditions(_but_meter(spec))}\nAND {_OF_ANY_METER}", _MOST_EXACT_OVERLAY
    on = _FITS.format(conditions=conditions)
    select = f"SELECT r.line FROM {source} AS k JOIN {spec.name.removesuffix('.csv')} AS r ON {on} ORDER BY {exact} DESC, r.line"
    return [line for (line,) in db.execute(select).fetchall()]


def match_deployments(source: str) -> str:
    """SQL: the table `deployment_of`, each distinct event key of `source` with its best row of `deployments` as the struct `best`."""
    return _best("deployment_of", source, "deployments", ("usage_date", *DEPLOYMENTS.matches), DEPLOYMENTS.matches, DEPLOYMENTS.gives)


def match_owners(source: str) -> str:
    """SQL: the table `owner_of`, each distinct payer of `source` with its best row of `cost_centers` as the struct `best`."""
    return _best("owner_of", source, "cost_centers", ("usage_date", *COST_CENTERS.matches), COST_CENTERS.matches, COST_CENTERS.gives)


def same_price_key(of: str) -> str:
    """SQL: that a row `of` has the price key of a row `r` of `rate_of`."""
    return " AND ".join(f"{of}.{name} IS NOT DISTINCT FROM r.{name}" for name in PRICE_KEY)


def cost(meter: str, quantity: str, price: str) -> str:
    """SQL: what a quantity on a meter costs at the price of one, exactly: DECIMAL(38,15). Overflow is an error."""
    if meter in ONE_BY_ONE:
        return f"CAST({quantity} AS DECIMAL(18,6)) * CAST({price} AS DECIMAL(20,9))"
    return f"CAST({quantity} AS DECIMAL(18,0)) * {price}"


def cost_by_meter(meter: str, quantity: str, price: str) -> str:
    """SQL: the same where `meter` is a column."""
    names = ", ".join(literal(name) for name in ONE_BY_ONE)
    return f"CASE WHEN {meter} IN ({names}) THEN {cost(ONE_BY_ONE[0], quantity, price)} ELSE {cost('', quantity, price)} END"


def match_prices(db: duckdb.DuckDBPyConnection, source: str, reference: Reference, meters: Sequence[str] = tuple(METER_QUANTITIES)) -> None:
    """Make the table `rate_of`: for each distinct priced key of `source` and each of the meters the price row and the exact prices of one.

    Cached input without a row of its own is rated at the input row and has status `fallback`. `token_price` (and the same at list and at
    contract prices) is unit price / unit tokens, by multiplication with a power of ten, so it is exact. An image has the price of its size
    and quality where there is a row for them. Raises `PriceOverflow`.
    """
    rows = " UNION ALL ".join(f"SELECT '{meter}' AS meter" for meter in meters)
    keyed = f"(SELECT s.*, m.meter FROM {source} AS s CROSS JOIN ({rows}) AS m)"
    gives = ("price_id", "unit_price", "unit_tokens", "currency")
    keys = (*PRICE_KEY, "meter")
    db.execute(_best("price_of", keyed, "price_book", keys, PRICE_BOOK.matches, gives, f"\nAND {_OF_METER}", _MOST_EXACT_OF_METER))
    same = " AND ".join(f"i.{name} IS NOT DISTINCT FROM p.{name}" for name in PRICE_KEY)
    db.execute(
        f"""CREATE OR REPLACE TABLE listed AS
        SELECT p.* EXCLUDE (best), coalesce(p.best, i.best) AS row,
        CASE WHEN p.best IS NOT NULL THEN 'priced' WHEN i.best IS NOT NULL THEN 'fallback' ELSE 'unpriced' END AS pricing_status
        FROM price_of AS p LEFT JOIN price_of AS i ON p.meter = 'cached_input' AND i.meter = 'input' AND {same}"""
    )
    _overlay(db, reference)
    one = """CAST(CAST({price} AS DECIMAL(24,9)) * CASE unit_tokens WHEN 1 THEN 1.000000 WHEN 10 THEN 0.100000 WHEN 100 THEN 0.010000
        WHEN 1000 THEN 0.001000 WHEN 10000 THEN 0.000100 WHEN 100000 THEN 0.000010 WHEN 1000000 THEN 0.000001 END AS DECIMAL(20,15))"""
    prices = ", ".join(f"{one.format(price=f'{level}unit_price')} AS {level}token_price" for level in ("", "list_", "contracted_"))
    db.execute(f"CREATE OR REPLACE TABLE rate_of AS SELECT * EXCLUDE (number), {prices} FROM resolved")


def _overlay(db: duckdb.DuckDBPyConnection, reference: Reference) -> None:
    """Make the table `resolved` out of `listed`: the price rows at list, contract and billed prices, in the billed currency.

    Where nothing changes a price, its row stands as it is. A price in a currency without an exchange rate is no price.
    """
    db.execute(
        """CREATE OR REPLACE TABLE resolved AS
        SELECT * EXCLUDE (row), row_number() OVER () AS number, row.price_id, row.unit_price, row.unit_tokens, row.currency,
            row.unit_price AS list_unit_price, row.unit_price AS contracted_unit_price, row.currency AS pricing_currency,
            CAST(NULL AS DECIMAL(18,9)) AS exchange_rate
        FROM listed"""
    )
    if not (reference.contract_prices or reference.markups or reference.billing_currency):
        return
    for target, spec in (("contract_of", CONTRACT_PRICES), ("markup_of", MARKUPS)):
        rows, keys = spec.name.removesuffix(".csv"), ("number", "usage_date", *spec.matches, "image_kind")
        db.execute(_best(target, "resolved", rows, keys, _but_meter(spec), spec.gives, f"\nAND {_OF_ANY_METER}", _MOST_EXACT_OVERLAY))
    billed = literal(reference.billing_currency) if reference.billing_currency else "currency"
    source = f"(SELECT number, usage_date, currency AS from_currency, {billed} AS to_currency FROM resolved)"
    exchanged = ("number", "usage_date", *EXCHANGE_RATES.matches)
    db.execute(_best("exchange_of", source, "exchange_rates", exchanged, EXCHANGE_RATES.matches, EXCHANGE_RATES.gives))
    found = db.execute(
        """SELECT number, p.price_id, p.meter, p.unit_price, p.unit_tokens, p.currency, to_currency,
            c.best.unit_price, c.best.unit_tokens, c.best.discount, m.best.markup, x.best.rate
        FROM resolved AS p JOIN contract_of AS c USING (number) JOIN markup_of AS m USING (number) JOIN exchange_of AS x USING (number)
        WHERE p.price_id IS NOT NULL"""
    ).fetchall()
    changed = []
    for number, price_id, meter, price, unit, currency, to, *given in found:
        contract_price, contract_unit, discount, markup, rate = (None if text is None else Decimal(text) for text in given)
        if currency == to:
            rate = None
        elif rate is None:
            changed.append((number, *[None] * 6))
            continue
        overlay = Overlay(contract_price, None if contract_unit is None else int(contract_unit), discount, markup, rate)
        if overlay != Overlay():
            try:
                prices = overlaid(price, unit, overlay, fractional=meter in ONE_BY_ONE)
            except PriceOverflow as error:
                raise PriceOverflow(f"price {price_id} with its contract, markup and exchange rate: {error}") from None
            changed.append((number, prices.list_unit_price, prices.contracted_unit_price, prices.unit_price, prices.unit_tokens, to, rate))
    money = pa.decimal128(18, PLACES)
    columns = {"number": pa.int64(), "listed": money, "contracted": money, "billed": money, "unit": pa.int64(), "billed_in": pa.string()}
    columns |= {"rate": money}
    overlays = pa.table({name: pa.array([row[n] for row in changed], type_) for n, (name, type_) in enumerate(columns.items())})  # noqa: F841
    db.execute(
        """UPDATE resolved SET list_unit_price = listed, contracted_unit_price = contracted, unit_price = billed, unit_tokens = unit,
            currency = billed_in, exchange_rate = rate, pricing_status = CASE WHEN billed IS NULL THEN 'unpriced' ELSE pricing_status END
        FROM overlays WHERE overlays.number = resolved.number"""
    )
