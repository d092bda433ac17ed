"""The columns of every table, declared once: they drive writing, checks, the UI's column metadata and the docs.

Types are DuckDB's. Times are UTC without a zone. Money is DECIMAL(38,15), a price is DECIMAL(18,9) per `unit_tokens`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: its DuckDB type and what it means."""

    name: str
    type: str
    description: str


def _columns(text: str) -> tuple[Column, ...]:
    columns = []
    for line in filter(str.strip, text.splitlines()):
        name, type_, description = line.strip().split(maxsplit=2)
        columns.append(Column(name, type_, description))
    return tuple(columns)


_ORIGIN = """
blob              VARCHAR  capture file the record was read from
partition_id      VARCHAR  partition of the event hub
sequence_number   BIGINT   the record's sequence number in its partition
offset            VARCHAR  the record's offset in its partition, opaque
record_index      INTEGER  place among the bodies of a record that holds several, otherwise NULL
enqueued_at       TIMESTAMP  when Event Hubs accepted the record
"""
_PAYER = """
gateway           VARCHAR  API Management service that took the call
subscription_id   VARCHAR  API Management subscription of the caller
product           VARCHAR  API Management product of the call
application       VARCHAR  calling application
"""
_OWNER = """
team              VARCHAR  owner of the usage, UNALLOCATED when nobody is known to own it
cost_center       VARCHAR  cost centre that pays, UNALLOCATED when unknown
department        VARCHAR  department of the cost centre, UNALLOCATED when unknown
"""
_DEPLOYMENT = """
deployment        VARCHAR  Azure OpenAI deployment, as the gateway named it
model             VARCHAR  model name, such as gpt-4o
model_version     VARCHAR  dated model version, such as 2024-11-20
deployment_sku    VARCHAR  deployment type, such as GlobalStandard
region            VARCHAR  Azure region or data zone of the deployment
service_tier      VARCHAR  service tier that answered; default when the event names none
"""
_TOKENS = """
prompt_tokens     BIGINT   input tokens, cached ones included
cached_tokens     BIGINT   input tokens read from the prompt cache, part of prompt_tokens
cache_write_tokens BIGINT  input tokens written to the prompt cache, part of prompt_tokens
completion_tokens BIGINT   output tokens, reasoning included
reasoning_tokens  BIGINT   reasoning tokens, part of completion_tokens
total_tokens      BIGINT   total as reported; prompt + completion where no total was reported
"""
_AUDIO = """
audio_prompt_tokens BIGINT   audio input tokens, part of prompt_tokens
cached_audio_tokens BIGINT   audio input tokens read from the prompt cache, part of cached_tokens and of audio_prompt_tokens
image_prompt_tokens BIGINT   image input tokens, part of prompt_tokens
cached_image_tokens BIGINT   image input tokens read from the prompt cache, part of cached_tokens and of image_prompt_tokens
audio_completion_tokens BIGINT audio output tokens, part of completion_tokens
image_completion_tokens BIGINT image output tokens, part of completion_tokens
images            BIGINT   images that were generated
image_kind        VARCHAR  size and quality of the images where they are known, such as 1024x1024/hd
characters        BIGINT   characters of text that was turned into speech
web_search_calls  BIGINT   calls of the built-in web search
file_search_calls BIGINT   calls of the built-in file search
code_interpreter_sessions BIGINT containers in which the built-in code interpreter ran
audio_seconds     DECIMAL(18,6)  seconds of audio, where the usage is counted in them
"""
_CALL = """
status_code       INTEGER  HTTP status of the response, where the event names it
service           VARCHAR  openai, or the other service that was called
end_user          VARCHAR  keyed hash of the end user, where the event names one
details           VARCHAR  what else the event says that a price or a person may need, as JSON
"""
_COST = """
cost              DECIMAL(38,15)  exact cost; NULL where nothing is priced
currency          VARCHAR  ISO 4217 code of cost
pricing_status    VARCHAR  priced, fallback (cached input at the input price), unpriced or no_usage
"""

RAW_EVENTS = _columns(
    _ORIGIN
    + """
namespace         VARCHAR  Event Hubs namespace, from the blob's name
event_hub         VARCHAR  event hub, from the blob's name
bytes             BIGINT   size of the body
contract          VARCHAR  event contract that reads the body
reason            VARCHAR  why the body is quarantined; NULL when it was parsed
body_sha256       VARCHAR  SHA-256 of a quarantined body
part              VARCHAR  usage or identity where the record is one half of a request, otherwise NULL
usage_date        DATE     UTC day of the request
event_time        TIMESTAMP  when the request was made
time_source       VARCHAR  event, or enqueued where the event's own time was missing or impossible
request_id        VARCHAR  identity of the request
"""
    + _PAYER
    + """
operation         VARCHAR  API operation
deployment        VARCHAR  deployment the gateway named
reported_model    VARCHAR  model the response named
reported_region   VARCHAR  region of the backend, where the event names it
service_tier      VARCHAR  service tier the response named
"""
    + _CALL
    + _TOKENS
    + _AUDIO
    + """
usage_source      VARCHAR  reported or estimated; NULL when the event carries no usage
body              VARCHAR  text of the body, prompts and answers included; NULL unless AOAI_KEEP_CONTENT is on
"""
)

ENRICHED_USAGE = _columns(
    """
usage_date        DATE     UTC day of the request
request_id        VARCHAR  identity of the request
event_time        TIMESTAMP  when the request was made
time_source       VARCHAR  event, or enqueued where the event's own time was missing or impossible
contract          VARCHAR  event contract the record came in
"""
    + _PAYER
    + _OWNER
    + """
operation         VARCHAR  API operation
reported_model    VARCHAR  model the response named
reported_region   VARCHAR  region of the backend, where the event names it
"""
    + _DEPLOYMENT
    + """
context_band      VARCHAR  long above 272,000 prompt tokens, otherwise short
"""
    + _CALL
    + _TOKENS
    + _AUDIO
    + """
usage_source      VARCHAR  reported or estimated; NULL when no event of the request carries usage
attributed        BOOLEAN  false while a record that says who called is missing
"""
    + _COST
    + """
copies            BIGINT   events of this request, on any day
conflict          BOOLEAN  whether its copies disagree on the usage
"""
    + _ORIGIN
)

DAILY_USAGE = _columns(
    "usage_date        DATE     UTC day of the requests"
    + _PAYER
    + _OWNER
    + _DEPLOYMENT
    + "requests          BIGINT   number of requests"
    + _TOKENS
    + _COST
)

DAILY_BILLING = _columns(
    """
usage_date        DATE     UTC day of the requests
billing_period    VARCHAR  month the line is billed in, YYYY-MM
"""
    + _PAYER
    + _OWNER
    + _DEPLOYMENT
    + """
meter             VARCHAR  what is counted; the meters of a day are disjoint
quantity          DECIMAL(24,6)  how much on this meter: whole tokens, images, characters or calls, seconds, or PTU-hours
unit_price        DECIMAL(18,9)  billed price per unit_tokens; NULL where a fixed cost is allocated
unit_tokens       BIGINT   number of tokens, or of what else the meter counts, the unit price is for
price_id          VARCHAR  row of the price book, or of the capacity or reservation
"""
    + _COST
    + """
usage_source      VARCHAR  reported or estimated; NULL for fixed costs
charge_class      VARCHAR  Correction for lines that correct a closed month, otherwise NULL
correction_of     VARCHAR  usage month a correction belongs to
list_unit_price   DECIMAL(18,9)  list price per unit_tokens, in the billed currency
contracted_unit_price DECIMAL(18,9)  price of the contract per unit_tokens, in the billed currency; the list price where there is none
list_cost         DECIMAL(38,15)  cost at the list price
contracted_cost   DECIMAL(38,15)  cost at the price of the contract; cost is this with the internal markup
pricing_currency  VARCHAR  currency of the price book's row
exchange_rate     DECIMAL(18,9)  billed currency per pricing currency; NULL where they are the same
line_id           VARCHAR  short hash of the line's key, the same however often the day is made
"""
)

QUARANTINE = _columns(
    "reason            VARCHAR  why the record cannot be billed"
    + _ORIGIN
    + """
bytes             BIGINT   size of the body
contract          VARCHAR  event contract that was recognised, if any
body_sha256       VARCHAR  SHA-256 of the body, to find it again
"""
)

CAPTURE_FILES = _columns(
    """
blob              VARCHAR  name of the capture file
etag              VARCHAR  version of the file that was read
bytes             BIGINT   size of the file
records           BIGINT   records in the file
events            BIGINT   bodies in the records: a diagnostics record holds several
first_sequence_number BIGINT lowest sequence number in the file
last_sequence_number BIGINT highest sequence number in the file
parsed            BIGINT   bodies that became raw events
quarantined       BIGINT   bodies that were set aside; parsed and quarantined make up the events
status            VARCHAR  read, empty or unreadable
reason            VARCHAR  why the file is unreadable
"""
)

DAILY_QUALITY = _columns(
    """
usage_date        DATE     UTC day of the requests
parsed            BIGINT   raw events of the day
accepted          BIGINT   requests that count on the day
duplicates        BIGINT   raw events that are copies of a request counted elsewhere
conflicts         BIGINT   requests whose copies disagree on the usage
no_usage          BIGINT   requests without token counts
unpriced          BIGINT   requests with usage that has no price
unallocated       BIGINT   requests without an owner
estimated         BIGINT   requests with estimated token counts
unattributed      BIGINT   requests with usage that wait for the record that says who called
coverage          DECIMAL(9,6)  share of successful Azure OpenAI calls with reported usage; NULL on a day without any
"""
)

_CAPTURE_DATE = _columns("capture_date DATE UTC day in the name of the capture file")

PUBLISHED = {
    "daily_usage": DAILY_USAGE,
    "daily_billing": DAILY_BILLING,
    "enriched_usage": ENRICHED_USAGE,
    "quarantine": _CAPTURE_DATE + QUARANTINE,
    "capture_files": _CAPTURE_DATE + CAPTURE_FILES,
    "daily_quality": DAILY_QUALITY,
}


def names(columns: tuple[Column, ...]) -> list[str]:
    """The columns' names, in order."""
    return [column.name for column in columns]


def camel(name: str) -> str:
    """A column's name as a document in Cosmos DB has it: `cost_center` is `costCenter`."""
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def document_fields(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The fields of a document with these columns, with JSON's types: a decimal is an exact string, beside it a number, named `…Number`."""
    fields = []
    for column in columns:
        name, type_ = camel(column.name), {"BIGINT": "number", "INTEGER": "number", "BOOLEAN": "boolean"}.get(column.type, "string")
        fields.append(Column(name, type_, column.description))
        if column.type.startswith("DECIMAL"):
            fields.append(Column(f"{name}Number", "number", f"{name} as the nearest number"))
    return tuple(fields)


STATEMENT_FIELDS = (
    Column("billingPeriod", "string", "the closed month, such as 2026-09"),
    Column("costCenter", "string", "who pays"),
    Column("statements", "array", "one statement for each currency; usage without a price is one without a currency"),
    Column("statements[].currency", "string", "currency of its amounts"),
    Column("statements[].total", "string", "exactly the sum of its lines; totalNumber is the nearest number"),
    Column("statements[].amount", "string", "what is charged: the total in whole cents"),
    Column("statements[].rounding", "string", "the difference of amount and total"),
    Column("statements[].dailyLines", "number", "number of lines of daily_billing it is made of"),
    Column("statements[].digest", "string", "SHA-256 over these lines"),
    Column("statements[].lines", "array", "the lines of one deployment, meter and price together: quantity, unitPrice, unitTokens, cost and more"),
)
"""What a document of the container `statements` has."""

DIMENSIONS = ("usage_date", *names(_columns(_PAYER + _OWNER + _DEPLOYMENT)))
"""What the daily tables keep apart: day, payer, owner and deployment."""

LINE_KEY = (*DIMENSIONS, "billing_period", "meter", "price_id", "pricing_status", "usage_source", "charge_class", "correction_of")
"""What a line of `daily_billing` is told apart by, without its amounts."""


def line_id() -> str:
    """SQL over lines of `daily_billing`: 24 hexadecimal digits of the SHA-256 of the line's key.

    Each value of the key is written as `bytes:text`, NULL as `-`. The number of the line among those of the same key comes last: 0, but
    where a contract or markup of one context band gives one price row two prices.
    """
    key = " || ".join(f"coalesce(strlen(CAST({name} AS VARCHAR)) || ':' || CAST({name} AS VARCHAR), '-')" for name in LINE_KEY)
    amounts = "unit_price, list_unit_price, contracted_unit_price, unit_tokens, quantity, cost"
    number = f"row_number() OVER (PARTITION BY {', '.join(LINE_KEY)} ORDER BY {amounts}) - 1"
    return f"left(sha256({key} || ({number})), 24)"


TOKENS = "CAST(coalesce(sum(coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)), 0) AS BIGINT)"
"""SQL: the tokens of a group of raw events or requests, as the ledger's identities count them."""


def select_list(columns: tuple[Column, ...], *, texts: bool = True) -> str:
    """`CAST(x AS type) AS x, …` for a SELECT that must give exactly these columns; without `texts`, enumerations stay what they are."""
    return ", ".join(f'CAST("{c.name}" AS {c.type}) AS "{c.name}"' if texts or c.type != "VARCHAR" else f'"{c.name}"' for c in columns)


def empty_select(columns: tuple[Column, ...]) -> str:
    """A SELECT of no rows with exactly these columns."""
    return "SELECT " + ", ".join(f'CAST(NULL AS {c.type}) AS "{c.name}"' for c in columns) + " WHERE false"
