"""From a decoded capture record to a raw event, as one SQL statement made from the contracts.

The statement runs over a stream of columns and looks at every body once per contract whose marker it contains. Every count is taken as
text and only then as a number, so that nothing becomes NULL or zero by a failed conversion.
"""

import datetime as dt
import hashlib
import hmac
import json
import re

import duckdb

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.capture.records import MAX_BODY_BYTES, TRUNCATED_BYTES
from aoai_usage_pipeline.lake.engine import literal
from aoai_usage_pipeline.usage import answers, estimate
from aoai_usage_pipeline.usage.contract import COUNT_COLUMNS, TEXT_COLUMNS, TOOL_COLUMNS, Contract, contracts

FILE_COLUMNS = ("blob", "namespace", "event_hub", "partition_id")
"""Columns of a raw event that its file gives."""

_COUNTED = (*COUNT_COLUMNS, *TOOL_COLUMNS)
_MAX_TOKENS = 1_000_000_000_000
_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_OUTPUT_DETAILS = ("completion_tokens_details", "output_tokens_details", "output_token_details")
_TOTALS = ("prompt_tokens", "input_tokens", "completion_tokens", "output_tokens", "total_tokens", "seconds")
_USAGE_SHAPE = json.dumps(dict.fromkeys((*_TOTALS, *_DETAILS, *_OUTPUT_DETAILS), "VARCHAR"))
_IN_DETAILS = ("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens", "reasoning_tokens", "cached_tokens_details")
_DETAILS_SHAPE = json.dumps(dict.fromkeys(_IN_DETAILS, "VARCHAR"))
_USAGE_COUNTS = {
    "prompt_tokens": "coalesce(u.prompt_tokens, u.input_tokens)",
    "completion_tokens": "coalesce(u.completion_tokens, u.output_tokens)",
    "total_tokens": "u.total_tokens",
    "cached_tokens": "i.cached_tokens",
    "cache_write_tokens": "i.cache_write_tokens",
    "audio_prompt_tokens": "i.audio_tokens",
    "cached_audio_tokens": "member(i.cached_tokens_details, '$.audio_tokens')",
    "image_prompt_tokens": "i.image_tokens",
    "cached_image_tokens": "member(i.cached_tokens_details, '$.image_tokens')",
    "audio_completion_tokens": "o.audio_tokens",
    "image_completion_tokens": "o.image_tokens",
    "reasoning_tokens": "o.reasoning_tokens",
}

_MACROS = """
CREATE OR REPLACE TEMP MACRO utc(t) AS TRY_CAST(t AS TIMESTAMPTZ) AT TIME ZONE 'UTC';
CREATE OR REPLACE TEMP MACRO is_iso(t) AS TRY_CAST(left(t, 4) AS USMALLINT) IS NOT NULL AND substr(t, 5, 1) = '-';
-- a time as .NET writes it in some culture, month first or day first
CREATE OR REPLACE TEMP MACRO month_first(t) AS try_strptime(t, ['%m/%d/%Y %I:%M:%S %p', '%m/%d/%Y %H:%M:%S', '%m/%d/%Y %I:%M %p', '%m/%d/%Y %H:%M']);
CREATE OR REPLACE TEMP MACRO day_first(t) AS try_strptime(t, ['%d/%m/%Y %I:%M:%S %p', '%d/%m/%Y %H:%M:%S', '%d/%m/%Y %I:%M %p', '%d/%m/%Y %H:%M',
    '%d.%m.%Y %H:%M:%S', '%d-%m-%Y %H:%M:%S', '%d.%m.%Y %H:%M', '%d-%m-%Y %H:%M']);
CREATE OR REPLACE TEMP MACRO plain_spaces(t) AS
    CASE WHEN strlen(t) = length(t) THEN t ELSE trim(replace(replace(t, chr(8239), ' '), chr(160), ' ')) END;
-- half a surrogate pair, which cut-off emoji leave behind, and a byte order mark make JSON invalid and mean nothing to us
CREATE OR REPLACE TEMP MACRO mended(body) AS regexp_replace(body, '^\\x{FEFF}|\\\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '', 'g');
-- -1 for what is not a count; the engine may work out a branch that it does not take, so no cast may fail
CREATE OR REPLACE TEMP MACRO token_count(t) AS CASE
    WHEN t IS NULL THEN NULL
    WHEN t IN ('', 'null') THEN NULL
    WHEN CAST(TRY_CAST(t AS UBIGINT) AS VARCHAR) = t AND length(t) <= 18 THEN TRY_CAST(t AS BIGINT)
    WHEN regexp_full_match(t, '\\s*[0-9]{1,18}(\\.0+)?\\s*') THEN TRY_CAST(split_part(trim(t), '.', 1) AS BIGINT)
    ELSE -1 END;
-- a member of an object as text; what should be an object and is none stays whole, so that it is no count
CREATE OR REPLACE TEMP MACRO member(t, path) AS CASE WHEN t LIKE '{%' THEN TRY(json_extract_string(t, path)) ELSE t END;
-- without e-mail and IP addresses
CREATE OR REPLACE TEMP MACRO redacted(t) AS regexp_replace(t, '[^\\s"<>@]+@[^\\s"<>@]+|\\b(?:[0-9]{1,3}\\.){3}[0-9]{1,3}\\b', '<redacted>', 'g');
-- what stands before a key of a body that was cut off, closed again
CREATE OR REPLACE TEMP MACRO before_key(body, key) AS rtrim(split_part(body, '"' || key || '"', 1), ', \t\r\n') || '}';
"""


def keyed_hash(key: bytes, text: str) -> str:
    """What stands for a secret or a person: HMAC-SHA256 in 32 hexadecimal digits."""
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32]


def prepare(db: duckdb.DuckDBPyConnection, hash_key: bytes) -> None:
    """Define what `raw_events_select` uses in a connection."""
    db.execute(_MACROS)
    db.create_function("answer", answers.read, ["VARCHAR"], "VARCHAR")
    db.create_function("estimate", estimate.estimate, ["VARCHAR", "VARCHAR", "VARCHAR"], "VARCHAR", null_handling="special")
    db.create_function("keyed_hash", lambda text: keyed_hash(hash_key, text), ["VARCHAR"], "VARCHAR")


def raw_events_select(source: str, *, start_date: dt.date, today: dt.date, estimated: bool, kept: bool) -> str:
    """A SELECT giving `file`, what of `RAW_EVENTS` does not follow from the file, `unknown_fields` and `request_hash`, one row
    per row of `source`.

    `source` has file, partition (its full name), window_start, sequence_number, offset, enqueued_text, body (text, NULL for a null body),
    head (the body's first bytes), valid (whether the body was UTF-8), bytes, record_index, body_hash and sampled (whether to look for
    unknown fields). `prepare` must have been called. A usage date must lie between `start_date` and the day after `today`. With
    `estimated`, usage that nobody reported is estimated from the text. With `kept`, a body that was read stays as text, unless it may hold a
    secret; a body that nothing reads may hold anything and never stays.
    """
    known = contracts()
    columns = tuple(c for c in tables.RAW_EVENTS if c.name not in FILE_COLUMNS)
    # a body is parsed for the contract whose marker comes first in it, and for every other one only where that recognises nothing
    markers = literal("|".join(re.escape(marker) for c in known for marker in c.markers))
    first_key = " ".join(f"WHEN starts_with(head, {literal('{' + marker)}) THEN {literal(marker)}" for c in known for marker in c.markers)
    parsed = ",\n    ".join(f"CASE WHEN marker IN ({_markers(c)}) THEN {_parse(c, 'body', estimated)} END AS e_{c.name}" for c in known)
    parsed_again = ",\n    ".join(
        f"CASE WHEN first_contract IS NOT NULL THEN e_{c.name} WHEN {_contains(c)} THEN {_parse_again(c, estimated)} END AS e_{c.name}" for c in known
    )
    contract = " ".join(f"WHEN e_{c.name} IS NOT NULL AND ({_over(c, c.matches)}) THEN {literal(c.name)}" for c in known)
    answered = " ".join(f"WHEN {literal(c.name)} THEN answer({_over(c, c.response)})" for c in known if c.response) or "WHEN '' THEN NULL"
    fields = "\n        ".join(f"WHEN {literal(c.name)} THEN {_fields(c, estimated)}" for c in known)
    guess = " ".join(f"WHEN {literal(marker)} THEN {literal(c.name)}" for c in known for marker in c.markers)
    known_fields = " ".join(f"WHEN {literal(c.name)} THEN [{', '.join(literal(f) for f in (*c.shape, *c.texts, *c.ignores))}]" for c in known)
    evidence = ", ".join(literal(c.name) for c in known if not c.billable) or "''"
    reported = ",\n    ".join(f"coalesce(f.r_{column}, {_USAGE_COUNTS.get(column, 'NULL')}) AS t_{column}" for column in _COUNTED)
    counts = ",\n    ".join(f"token_count(t_{column}) AS {column}" for column in _COUNTED)
    bad_count = " ".join(f"WHEN {c} NOT BETWEEN 0 AND {_MAX_TOKENS} THEN 'invalid_count: {c} is not a count'" for c in _COUNTED)
    secrets = literal("|".join(sorted({re.escape(secret) for c in known for secret in c.secrets})))
    kept_body = f"CASE WHEN reason IS NULL AND NOT regexp_matches(body, {secrets}, 'i') THEN body END" if kept else "NULL"
    earliest = f"TIMESTAMP '{start_date}'"
    return f"""
WITH marked AS (
    SELECT *, CASE {first_key} ELSE regexp_extract(head, {markers}) END AS marker FROM {source}
), parsed AS (
    SELECT *,
    coalesce(month_first(plain_spaces(enqueued_text)), utc(enqueued_text), window_start) AS enqueued_at,
    {parsed}
    FROM marked
), recognised AS (
    SELECT *, CASE {contract} END AS first_contract FROM parsed
), mended AS (
    SELECT *, CASE WHEN first_contract IS NULL THEN mended(body) END AS mended_body FROM recognised
), parsed_again AS (
    SELECT * REPLACE ({parsed_again}) FROM mended
), recognised_again AS (
    SELECT *, CASE WHEN first_contract IS NOT NULL THEN first_contract ELSE CASE {contract} END END AS contract FROM parsed_again
), answered AS (
    SELECT *, TRY(json_transform(CASE contract {answered} END, {literal(answers.SHAPE)})) AS a FROM recognised_again
), fields AS (
    SELECT * EXCLUDE ({", ".join(f"e_{c.name}" for c in known)}),
    CASE contract
        {fields}
    END AS f,
    CASE WHEN contract IS NOT NULL AND bytes >= {TRUNCATED_BYTES} AND first_contract IS NULL THEN NOT json_valid(mended_body) ELSE false END AS is_cut
    FROM answered
), usage AS (
    SELECT *, coalesce(f.estimate, f.usage_text) AS usage_text, f.estimate IS NOT NULL AS estimated,
    CASE WHEN usage_text LIKE '{{%' THEN TRY(json_transform(usage_text, {literal(_USAGE_SHAPE)})) END AS u
    FROM fields
), details AS (
    SELECT *,
    coalesce({", ".join(f"u.{name}" for name in _DETAILS)}) AS input_text,
    coalesce({", ".join(f"u.{name}" for name in _OUTPUT_DETAILS)}) AS output_text
    FROM usage
), opened AS (
    SELECT *,
    CASE WHEN input_text LIKE '{{%' THEN TRY(json_transform(input_text, {literal(_DETAILS_SHAPE)})) END AS i,
    CASE WHEN output_text LIKE '{{%' THEN TRY(json_transform(output_text, {literal(_DETAILS_SHAPE)})) END AS o
    FROM details
), texts AS (
    SELECT *, {", ".join(f"f.{column} AS {column}" for column in TEXT_COLUMNS if column not in ("event_time", "status_code"))},
    TRY_CAST(f.status_code AS INTEGER) AS status_code, coalesce(f.placeholder, false) AS placeholder,
    plain_spaces(f.event_time) AS time_text, u.seconds AS seconds_text,
    {reported}
    FROM opened
), counted AS (
    SELECT * EXCLUDE (f, a, u, i, o),
    u IS NULL AS no_usage_object, i IS NULL AS no_input_object, o IS NULL AS no_output_object,
    {counts}
    FROM texts
), timed AS (
    SELECT *, CASE WHEN is_iso(time_text) THEN utc(time_text) ELSE month_first(time_text) END AS first_reading
    FROM counted
), timed_again AS (
    -- where the first reading does not fit the hub's clock, the day may come first; where neither does, the first one is taken
    SELECT *, CASE WHEN first_reading BETWEEN enqueued_at - INTERVAL 1 HOUR AND enqueued_at + INTERVAL 1 DAY THEN NULL
        WHEN is_iso(time_text) THEN NULL ELSE day_first(time_text) END AS second_reading,
    -- AM and PM speak for the month first, so a day-first reading must fit better to be believed
    CASE WHEN regexp_matches(time_text, '[AP]M$') THEN INTERVAL 1 HOUR ELSE INTERVAL 2 DAY END AS tolerance
    FROM timed
), own AS (
    SELECT *, CASE
        WHEN second_reading BETWEEN greatest(enqueued_at - tolerance, {earliest}) AND enqueued_at + INTERVAL 1 DAY THEN second_reading
        -- an event that is months late is more likely one whose day comes first
        WHEN second_reading > first_reading AND first_reading < enqueued_at - INTERVAL 60 DAY AND tolerance > INTERVAL 1 HOUR
            AND second_reading BETWEEN {earliest} AND enqueued_at + INTERVAL 1 DAY THEN second_reading
        WHEN first_reading BETWEEN {earliest} AND enqueued_at + INTERVAL 1 DAY THEN first_reading
        WHEN first_reading IS NULL AND second_reading BETWEEN {earliest} AND enqueued_at + INTERVAL 1 DAY THEN second_reading
        END AS own_time
    FROM timed_again
), completed AS (
    SELECT * REPLACE (
        CASE WHEN NOT placeholder THEN coalesce(prompt_tokens, total_tokens - completion_tokens) END AS prompt_tokens,
        CASE WHEN NOT placeholder THEN coalesce(completion_tokens, total_tokens - prompt_tokens) END AS completion_tokens,
        CASE WHEN NOT placeholder
            THEN coalesce(total_tokens, prompt_tokens + completion_tokens, prompt_tokens, completion_tokens) END AS total_tokens
    ),
    CASE {bad_count} WHEN seconds_text <> 'null' AND coalesce(TRY_CAST(seconds_text AS DECIMAL(18,6)), -1) < 0
        THEN 'invalid_count: seconds is not a number from 0' END AS bad_count,
    TRY_CAST(seconds_text AS DECIMAL(18,6)) AS audio_seconds,
    coalesce(own_time, enqueued_at) AS resolved_time,
    CASE WHEN own_time IS NULL THEN 'enqueued' ELSE 'event' END AS time_source
    FROM own
), judged AS (
    SELECT *, CASE
        WHEN bytes > {MAX_BODY_BYTES} THEN 'too_large: the body has more than {MAX_BODY_BYTES} bytes'
        WHEN NOT valid THEN 'not_utf8: the body is not UTF-8 text'
        WHEN body IS NULL THEN 'null_body: the record has no body'
        WHEN contract IS NULL THEN CASE
            WHEN trim(body, ' \t\r\n') = '' THEN 'empty_body: the body is blank'
            WHEN bytes >= {TRUNCATED_BYTES} AND marker <> '' AND NOT json_valid(body) THEN 'truncated: request id and time were cut off'
            WHEN NOT json_valid(body) THEN 'invalid_json: the body is not JSON'
            WHEN json_type(body) <> 'OBJECT' THEN 'unknown_contract: the body is not a JSON object'
            ELSE 'unknown_contract: top-level fields ' || redacted(left(array_to_string(list_sort(json_keys(body)), ', '), 200)) END
        WHEN is_cut AND (request_id IS NULL OR time_text IS NULL) THEN 'truncated: request id and time were cut off'
        WHEN bad_count IS NOT NULL THEN bad_count
        WHEN usage_text IS NOT NULL AND usage_text <> 'null' AND no_usage_object THEN 'invalid_usage: the usage is not an object'
        WHEN (input_text IS NOT NULL AND no_input_object) OR (output_text IS NOT NULL AND no_output_object)
            THEN 'invalid_usage: token details are not an object'
        WHEN prompt_tokens IS NULL AND completion_tokens IS NULL AND total_tokens IS NOT NULL
            THEN 'invalid_usage: a total without prompt or completion tokens'
        WHEN prompt_tokens < 0 OR completion_tokens < 0 THEN 'conflict: total_tokens is less than one of its parts'
        WHEN coalesce(cached_audio_tokens, 0) > coalesce(cached_tokens, 0) OR coalesce(cached_audio_tokens, 0) > coalesce(audio_prompt_tokens, 0)
            THEN 'conflict: cached audio tokens exceed cached or audio tokens'
        WHEN coalesce(cached_image_tokens, 0) > coalesce(image_prompt_tokens, 0)
            OR coalesce(cached_image_tokens, 0) + coalesce(cached_audio_tokens, 0) > coalesce(cached_tokens, 0)
            THEN 'conflict: cached image tokens exceed cached or image tokens'
        WHEN coalesce(cached_tokens, 0) + coalesce(cache_write_tokens, 0) + coalesce(audio_prompt_tokens, 0) - coalesce(cached_audio_tokens, 0)
            + coalesce(image_prompt_tokens, 0) - coalesce(cached_image_tokens, 0) > coalesce(prompt_tokens, 0)
            THEN 'conflict: cached, cache-write, audio and image tokens exceed prompt_tokens'
        WHEN coalesce(audio_completion_tokens, 0) + coalesce(image_completion_tokens, 0) > coalesce(completion_tokens, 0)
            OR coalesce(reasoning_tokens, 0) > coalesce(completion_tokens, 0)
            THEN 'conflict: reasoning, audio or image tokens exceed completion_tokens'
        WHEN resolved_time < {earliest} OR resolved_time >= TIMESTAMP '{today + dt.timedelta(2)}'
            THEN 'out_of_range: neither event time nor enqueued time lies between the start date and tomorrow'
        END AS reason
    FROM completed
)
SELECT file, unknown_fields, hash(request_id) AS request_hash, {tables.select_list(columns)}
FROM (
    SELECT * REPLACE (
        coalesce(nullif(trim(request_id), ''), partition || '/' || sequence_number || coalesce('/' || record_index, '')) AS request_id,
        coalesce(contract, CASE marker {guess} END) AS contract,
        redacted(details) AS details,
        {kept_body} AS body,
        coalesce(service, 'openai') AS service,
        CASE lower(service_tier) WHEN 'standard' THEN 'default' ELSE nullif(lower(service_tier), '') END AS service_tier,
        nullif(regexp_extract(lower(image_kind), '^[1-9][0-9]*x[1-9][0-9]*(/[a-z]+)?'), '') AS image_kind
    ),
    CASE WHEN reason IS NULL AND contract NOT IN ({evidence}) THEN CAST(resolved_time AS DATE) END AS usage_date,
    CASE WHEN sampled AND reason IS NULL
        THEN nullif(list_transform(list_filter(TRY(json_keys(body)), lambda field: NOT list_contains(CASE contract {known_fields} END, field)),
            lambda field: redacted(field)), []) END AS unknown_fields,
    CASE WHEN reason IS NULL THEN resolved_time END AS event_time,
    CASE WHEN coalesce(prompt_tokens, completion_tokens, images, characters, audio_seconds) IS NOT NULL
        THEN CASE WHEN estimated THEN 'estimated' ELSE 'reported' END END AS usage_source,
    CASE WHEN reason IS NOT NULL THEN coalesce(body_hash, sha256(body)) END AS body_sha256
    FROM judged
)
"""


def _markers(contract: Contract) -> str:
    return ", ".join(literal(marker) for marker in contract.markers)


def _contains(contract: Contract) -> str:
    return " OR ".join(f"contains(body, {literal(marker)})" for marker in contract.markers)


def _parse(contract: Contract, text: str, with_texts: bool) -> str:
    return f"TRY(json_transform({text}, {literal(contract.shape_json(with_texts=with_texts))}))"


def _parse_again(contract: Contract, with_texts: bool) -> str:
    """SQL: a body parsed without what made it invalid, or up to where it was cut off."""
    if not contract.truncated_at:
        return _parse(contract, "mended_body", with_texts)
    cut = _parse(contract, f"before_key(body, {literal(contract.truncated_at)})", with_texts)
    return f"coalesce({_parse(contract, 'mended_body', with_texts)}, CASE WHEN bytes >= {TRUNCATED_BYTES} THEN {cut} END)"


def _over(contract: Contract, expression: str | None) -> str:
    return re.sub(r"\be\.", f"e_{contract.name}.", expression or "NULL")


def _fields(contract: Contract, estimated: bool) -> str:
    """SQL: one struct with everything that a contract says of an event, the same shape for every contract."""
    texts = {column: contract.fields.get(column) for column in TEXT_COLUMNS}
    texts |= {f"r_{column}": contract.counts.get(column) for column in _COUNTED} | {"usage_text": contract.usage, "estimate": None}
    if estimated and contract.estimate:
        counts = ", ".join(f"token_count({sql})" for sql in contract.counts.values()) or "NULL"
        unreported = f"coalesce({contract.usage or 'NULL'}, 'null') = 'null' AND coalesce({counts}) IS NULL"
        texts["estimate"] = f"CASE WHEN {unreported} THEN {contract.estimate} END"
    parts = [f"{name} := CAST({_over(contract, sql)} AS VARCHAR)" for name, sql in texts.items()]
    return f"struct_pack({', '.join(parts)}, placeholder := {_over(contract, contract.placeholder)})"
