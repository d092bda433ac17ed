"""What Event Hubs Capture wrote: read whole or not at all, and found by the hub's name format."""

import contextlib
import datetime as dt
import io
import unittest.mock
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.capture import avro
from aoai_usage_pipeline.capture.names import NameFormat
from aoai_usage_pipeline.settings import DEFAULT_NAME_FORMAT
from aoai_usage_pipeline.storage import StoredObject, open_store

DATA = Path(__file__).parent / "data"
EMPTY, OLD, ONE, TWENTY = (
    (DATA / f"{name}.avro").read_bytes() for name in ("cosh_empty", "dxfrance_05", "mba_p9--2022-12-09--16-50-12", "mba_p9--2022-12-09--17-10-12")
)
SYNC = b"0123456789abcdef"
Row = tuple[int, str, str, bytes | None]


def decoded(content: bytes) -> list[Row]:
    """What the package reads: sequence number, offset, enqueued time and body of every record."""
    return rows_of(avro.read(content))


def rows_of(records: avro.Records) -> list[Row]:
    numbers = records.fields[:, 0].tolist()
    offsets, times, bodies = (_texts(records, field) for field in (avro.OFFSET, avro.ENQUEUED, avro.BODY))
    assert len(records) == len(numbers)
    return [(n, o.decode(), t.decode(), b) for n, o, t, b in zip(numbers, offsets, times, bodies, strict=True)]


def _texts(records: avro.Records, field: int) -> list[bytes | None]:
    return [None if size < 0 else records.content[at : at + size] for at, size in records.fields[:, field : field + 2].tolist()]


def plain(content: bytes, **options: Any) -> list[Row]:
    """The same as fastavro alone reads it."""
    rows = fastavro.reader(io.BytesIO(content), **options)
    return [(row["SequenceNumber"], row["Offset"], row["EnqueuedTimeUtc"], row["Body"]) for row in rows]


def record(number: int = 0, body: bytes | None = b"{}", system: dict | None = None, properties: dict | None = None) -> dict[str, Any]:
    return {
        "SequenceNumber": number,
        "Offset": str(number * 312),
        "EnqueuedTimeUtc": "12/9/2022 4:51:25 PM",
        "SystemProperties": system or {},
        "Properties": properties or {},
        "Body": body,
    }


def schema(*, null_in_properties: bool = True) -> dict[str, Any]:
    """Capture's schema as it was before and after it allowed null in Properties."""
    types = ["long", "double", "string", "bytes"]
    properties = [*types, "null"] if null_in_properties else types
    fields = [("SequenceNumber", "long"), ("Offset", "string"), ("EnqueuedTimeUtc", "string")]
    fields += [("SystemProperties", {"type": "map", "values": types}), ("Properties", {"type": "map", "values": properties})]
    fields += [("Body", ["null", "bytes"])]
    return {"type": "record", "name": "Microsoft.ServiceBus.Messaging.EventData", "fields": [{"name": n, "type": t} for n, t in fields]}


def avro_file(records: Iterable[dict[str, Any]], *, codec: str = "null", block_bytes: int = 2**40, of: dict[str, Any] | None = None) -> bytes:
    """A file as some other writer makes it, in blocks of about `block_bytes`."""
    file = io.BytesIO()
    fastavro.writer(file, of or schema(), records, codec=codec, sync_interval=block_bytes, sync_marker=SYNC)
    return file.getvalue()


def zigzag(number: int) -> bytes:
    """An Avro long."""
    value, text = number << 1, b""
    while value > 127:
        text += bytes([value & 127 | 128])
        value >>= 7
    return text + bytes([value])


def test_the_genuine_files_have_the_records_their_repositories_say():
    assert [len(avro.read(content)) for content in (EMPTY, OLD, ONE, TWENTY)] == [0, 1, 1, 20]
    assert len(EMPTY) == 508


@pytest.mark.parametrize("content", [EMPTY, OLD, ONE, TWENTY])
def test_the_genuine_files_are_read_as_fastavro_reads_them(content):
    assert decoded(content) == plain(content)


def test_the_genuine_files_numbers_and_times():
    assert decoded(OLD)[0][:3] == (0, "0", "11/16/2016 4:44:11 PM")
    assert decoded(ONE)[0][:3] == (1, "1456", "12/9/2022 4:51:25 PM")
    rows = decoded(TWENTY)
    assert [row[0] for row in rows] == list(range(4, 24))
    assert (rows[0][2], rows[-1][2]) == ("12/9/2022 5:10:16 PM", "12/9/2022 5:12:26 PM")


@pytest.mark.parametrize("codec", ["null", "deflate"])
@pytest.mark.parametrize("block_bytes", [1, 200, 2**40], ids=["block per record", "some blocks", "one block"])
@pytest.mark.parametrize("null_in_properties", [True, False])
def test_every_codec_block_size_and_schema_gives_the_same_records(codec, block_bytes, null_in_properties):
    values = {"long": -(2**63), "zero": 0, "double": 2.5, "string": "é" * 100, "bytes": bytes(range(256)), "blank": ""}
    properties = values | ({"null": None} if null_in_properties else {})
    records = [record(n, None if n % 3 == 1 else b"x" * 77 * n, values, properties) for n in range(12)]
    content = avro_file(records, codec=codec, block_bytes=block_bytes, of=schema(null_in_properties=null_in_properties))
    assert decoded(content) == [(r["SequenceNumber"], r["Offset"], r["EnqueuedTimeUtc"], r["Body"]) for r in records]


def test_null_and_empty_bodies_are_different_things():
    bodies = [None, b"", b"\x00", b"\xff\xfe", b"x" * 13, None]
    assert [row[3] for row in decoded(avro_file(record(n, body) for n, body in enumerate(bodies)))] == bodies


def test_offsets_are_opaque_text():
    rows = [record(n) | {"Offset": offset} for n, offset in enumerate(["336", "", "aaaa:1:2:-1", "é" * 90])]
    assert [row[1] for row in decoded(avro_file(rows))] == [row["Offset"] for row in rows]


@pytest.mark.parametrize("number", [0, -1, 63, 64, 2**31, 2**62, 2**63 - 1, -(2**63)])
def test_sequence_numbers_are_64_bits(number):
    assert decoded(avro_file([record() | {"SequenceNumber": number}]))[0][0] == number


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_what_the_package_writes_is_what_it_was_given(codec):
    records = [record(n, None if n == 2 else b"body %d" % n, {"x-opt-enqueued-time": 1670604685193}) for n in range(4)]
    content = avro.write(records, codec=codec)
    assert decoded(content) == plain(content) == [(r["SequenceNumber"], r["Offset"], r["EnqueuedTimeUtc"], r["Body"]) for r in records]


def test_a_written_empty_file_is_the_genuine_one_byte_by_byte():
    assert len(EMPTY) == 508 and avro.write([], sync_marker=EMPTY[-16:]) == EMPTY
    assert decoded(EMPTY) == []


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_records_read_with_everything_in_them_are_those_that_were_written(codec):
    properties = {"text": "é", "bytes": b"\xff", "long": 2**63 - 1, "double": 0.5, "null": None}
    records = [record(n, None if n == 2 else b"body %d" % n) | {"Properties": properties if n else {}} for n in range(4)]
    content = avro.write(records, codec=codec)
    assert avro.records(content) == records == list(fastavro.reader(io.BytesIO(content)))
    with pytest.raises(avro.Unreadable, match="torn"):
        avro.records(content[:-20])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"O", "not an Avro file"),
        (b'{"SubscriptionId": "sales"}', "not an Avro file"),
        (b"Obj\x02" + EMPTY[4:], "not an Avro file"),
        (EMPTY[:4], "torn|damaged"),
    ],
)
def test_what_is_not_an_avro_file_is_unreadable(content, reason):
    with pytest.raises(avro.Unreadable, match=reason):
        avro.read(content)


def test_a_file_of_iot_hub_routing_is_unreadable_and_its_lack_is_named():
    fields = [("EnqueuedTimeUtc", "string"), ("Properties", {"type": "map", "values": "string"}), ("Body", ["null", "bytes"])]
    message = {"type": "record", "name": "Microsoft.Azure.Devices.Message", "fields": [{"name": n, "type": t} for n, t in fields]}
    content = avro_file([{"EnqueuedTimeUtc": "2016-12-22T19:09:05Z", "Properties": {}, "Body": b"{}"}], of=message)
    with pytest.raises(avro.Unreadable, match="its schema lacks Offset, SequenceNumber"):
        avro.read(content)


@pytest.mark.parametrize(
    ("field", "kind", "value"), [("SequenceNumber", "string", "x"), ("EnqueuedTimeUtc", "long", 5), ("Body", "string", "text"), ("Body", "int", 5)]
)
def test_a_file_whose_fields_have_other_types_is_unreadable(field, kind, value):
    other = schema()
    for declared in other["fields"]:
        if declared["name"] == field:
            declared["type"] = kind
    with pytest.raises(avro.Unreadable):
        avro.read(avro_file([record() | {field: value}], of=other))


def test_a_schema_with_other_fields_in_another_order_is_still_a_capture_file():
    other = schema()
    other["fields"] = [{"name": "Extra", "type": "double"}, *reversed(other["fields"])]
    content = avro_file([record(n, b"body") | {"Extra": 1.5} for n in range(3)], of=other)
    assert decoded(content) == [(n, str(n * 312), "12/9/2022 4:51:25 PM", b"body") for n in range(3)]


@pytest.mark.parametrize(
    "content",
    [EMPTY, OLD, ONE, avro_file([record(n, b"x" * 20 * n) for n in range(3)], codec="deflate"), avro_file([record(1, None)])],
    ids=["empty", "old", "one", "deflate", "null body"],
)
def test_a_file_torn_at_any_byte_never_gives_some_of_its_records(content):
    header = content.index(content[-16:]) + 16
    for length in range(len(content)):
        if length == header:
            assert decoded(content[:length]) == []
            continue
        with pytest.raises(avro.Unreadable):
            avro.read(content[:length])


def test_a_torn_file_of_many_records_says_that_it_is_torn():
    for length in (len(TWENTY) // 3, len(TWENTY) * 2 // 3, len(TWENTY) - 40):
        with pytest.raises(avro.Unreadable, match="torn: it ends after"):
            avro.read(TWENTY[:length])


@pytest.mark.parametrize("codec", ["null", "deflate"])
@pytest.mark.parametrize("claimed", [0, 1, 19, 21, 2**40])
def test_a_block_that_does_not_hold_the_records_it_says_is_unreadable(codec, claimed):
    content = avro_file([record(n) for n in range(20)], codec=codec)
    block = content.index(SYNC) + 16
    assert content[block : block + 1] == zigzag(20)
    with pytest.raises(avro.Unreadable):
        avro.read(content[:block] + zigzag(claimed) + content[block + 1 :])


def test_bytes_after_the_last_block_make_a_file_unreadable():
    content = avro_file([record(n) for n in range(3)])
    for garbage in (b"\x00", b"\x02", SYNC, b"\xff" * 40):
        with pytest.raises(avro.Unreadable):
            avro.read(content + garbage)


def test_text_that_is_utf8_only_when_two_fields_are_put_together_is_unreadable():
    split = avro_file([record(n) | {"Offset": "??"} for n in range(2)])
    first, second = split.index(b"??"), split.rindex(b"??")
    broken = bytearray(split)
    broken[first : first + 2], broken[second : second + 2] = b"a\xc3", b"\xa9b"
    with pytest.raises(avro.Unreadable):
        avro.read(bytes(broken))


LONGS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=20) | st.sampled_from(["x" * 63, "é" * 64, "y" * 9000])
VALUES = LONGS | st.floats(allow_nan=False) | TEXT | st.binary(max_size=80)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {
            "SequenceNumber": LONGS,
            "Offset": TEXT,
            "EnqueuedTimeUtc": TEXT,
            "SystemProperties": st.dictionaries(TEXT, VALUES, max_size=4),
            "Properties": st.dictionaries(TEXT, VALUES | st.none(), max_size=4),
            "Body": st.none() | st.binary(max_size=200),
        }
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.sampled_from(["null", "deflate"]), st.sampled_from([1, 300, 2**40]))
def test_random_records_are_read_as_fastavro_reads_them(records, codec, block_bytes):
    content = avro_file(records, codec=codec, block_bytes=block_bytes)
    assert decoded(content) == plain(content)


@settings(max_examples=200, deadline=None)
@given(RECORDS.filter(len), st.lists(st.tuples(LONGS, TEXT, st.none() | st.binary(max_size=200)), max_size=8), st.sampled_from(["null", "deflate"]))
def test_a_file_like_one_before_is_read_alike_without_fastavro(records, others, codec):
    first, system = records[0], {f"key {n}": value for n, value in enumerate(records[0]["SystemProperties"].values())}
    alike = [first | {"SystemProperties": system, "SequenceNumber": n, "Offset": text, "Body": body} for n, text, body in others]
    avro.read(avro_file([first | {"SystemProperties": system, "SequenceNumber": 0, "Offset": "0", "Body": b""}], codec=codec))
    content = avro_file(alike, codec=codec)
    expected = plain(content)
    # what the constant bytes of the maps are may also stand in a text; then the file is read the slow way
    anywhere = b"".join(row["Offset"].encode() + (row["Body"] or b"") for row in alike)
    with contextlib.ExitStack() as stack:
        longs = [n for n, *_ in others] + [value for value in (system | first["Properties"]).values() if isinstance(value, int)]
        short = all(abs(n) < 2**61 for n in longs) and len(first["EnqueuedTimeUtc"].encode()) < 64
        if system and b"key" not in anywhere and short:
            stack.enter_context(unittest.mock.patch.object(fastavro, "block_reader", side_effect=AssertionError("fastavro was asked")))
        assert decoded(content) == expected


MANY = [record(n * 700, None if n % 4 == 3 else b"body" * n, {"k": 1, "d": 2.5}, {"s": "text", "b": b"by", "n": None}) for n in range(9)]
BASES = [ONE, OLD, EMPTY, avro_file(MANY), avro_file(MANY, block_bytes=100), avro_file(MANY[:3], codec="deflate")]
DAMAGE = st.lists(st.tuples(st.sampled_from(["flip", "insert", "delete"]), st.integers(1, 2000), st.integers(0, 255)), min_size=1, max_size=3)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(BASES), DAMAGE)
def test_a_damaged_file_is_unreadable_or_read_as_fastavro_reads_it(base, damage):
    content = bytearray(base)
    for kind, from_end, byte in damage:
        at = -from_end % len(content)
        if kind == "flip":
            content[at] ^= byte or 1
        elif kind == "insert":
            content.insert(at, byte)
        else:
            del content[at]
    try:
        rows = decoded(bytes(content))
    except avro.Unreadable:
        return
    # text of the properties, which nobody reads, may be broken
    assert rows == plain(bytes(content), handle_unicode_errors="replace")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([avro_file(MANY[n:]) for n in range(9)] + BASES), st.none() | DAMAGE), min_size=1, max_size=6))
def test_files_read_together_are_read_as_each_alone(files):
    contents = []
    for base, damage in files:
        content = bytearray(base)
        for _, from_end, byte in damage or []:
            content[-from_end % len(content)] ^= byte
        contents.append(bytes(content))
    avro.read(avro_file(MANY))
    found = avro.read_many(contents)
    for content, together in zip(contents, found, strict=True):
        try:
            alone = decoded(content)
        except avro.Unreadable as error:
            assert str(together) == str(error)
        else:
            assert rows_of(together) == alone


DATE_AFTER_PARTITION = [
    DEFAULT_NAME_FORMAT,
    "{Namespace}/{EventHub}/p{PartitionId}--{Year}-{Month}-{Day}--{Hour}-{Minute}-{Second}",
    "{Namespace}/{EventHub}/p={PartitionId}/y={Year}/m={Month}/d={Day}/h={Hour}/mm={Minute}/{Second}",
    "{PartitionId}/{EventHub}.{Namespace}/date={Year}-{Month}-{Day}/{Hour}{Minute}{Second}",
    "fixed folder/{Namespace}/{EventHub}/{PartitionId}/{Year}/{Month}{Day}/{Hour}_{Minute}_{Second}",
]
DATE_BEFORE_PARTITION = [
    "{Namespace}/{EventHub}/{Year}/{Month}/{Day}/{PartitionId}/{Hour}/{Minute}/{Second}",
    "{Year}-{Month}-{Day}/{Namespace}/{EventHub}/{PartitionId}/{Hour}-{Minute}-{Second}",
    "{Namespace}/{EventHub}/{Day}.{Month}.{Year}/{Hour}{Minute}{Second}_{PartitionId}",
    "{Year}/{Namespace}/{EventHub}/{Month}/{Day}T{Hour}/{Minute}/{Second}/{PartitionId}",
    "{Namespace}/{EventHub}/{Year}{Month}{Day}T{Hour}{Minute}{Second}/{Year}/{PartitionId}",
]
FORMATS = DATE_AFTER_PARTITION + DATE_BEFORE_PARTITION
NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)


def stored(name: str) -> StoredObject:
    return StoredObject(name, "etag", 508, NOW)


def test_the_default_format_gives_the_names_capture_gives():
    name = "ns/hub/7/2026/03/01/04/05/06.avro"
    start = dt.datetime(2026, 3, 1, 4, 5, 6)
    assert NameFormat(DEFAULT_NAME_FORMAT).name("ns", "hub", "7", start) == name
    file = NameFormat(DEFAULT_NAME_FORMAT).parse(stored(name))
    assert (file.namespace, file.event_hub, file.partition_id, file.window_start, file.capture_date) == ("ns", "hub", "7", start, start.date())


def test_the_deployed_formats_give_the_names_capture_gives():
    start = dt.datetime(2022, 12, 9, 17, 10, 12)
    assert NameFormat(DATE_AFTER_PARTITION[1]).name("ns", "hub", "9", start) == "ns/hub/p9--2022-12-09--17-10-12.avro"
    assert NameFormat(DATE_AFTER_PARTITION[2]).name("ns", "hub", "9", start) == "ns/hub/p=9/y=2022/m=12/d=09/h=17/mm=10/12.avro"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.from_regex(r"[a-z][a-z0-9-]{4,20}[a-z0-9]", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True),
    st.integers(0, 2000).map(str),
    st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2999, 12, 31)).map(lambda at: at.replace(microsecond=0)),
)
def test_a_name_is_read_back_as_what_it_was_made_from(text, namespace, event_hub, partition_id, start):
    names = NameFormat(text)
    file = names.parse(stored(names.name(namespace, event_hub, partition_id, start)))
    assert file is not None
    assert (file.namespace, file.event_hub, file.partition_id, file.window_start) == (namespace, event_hub, partition_id, start)


def test_a_format_without_seconds_starts_windows_at_the_minute():
    names = NameFormat("{Namespace}/{EventHub}/{PartitionId}/{Year}/{Month}/{Day}/{Hour}/{Minute}")
    assert names.parse(stored("ns/hub/0/2026/10/05/12/30.avro")).window_start == dt.datetime(2026, 10, 5, 12, 30)


@pytest.mark.parametrize("suffix", [".avro", "/"])
def test_the_suffix_capture_adds_may_be_written_in_the_format(suffix):
    assert NameFormat(DEFAULT_NAME_FORMAT + suffix).parse(stored("ns/hub/7/2026/03/01/04/05/06.avro")).partition_id == "7"


@pytest.mark.parametrize("token", ["PartitionId", "Year", "Month", "Day", "Hour", "Minute"])
def test_a_missing_token_is_an_error_that_names_it_and_the_setting(token):
    with pytest.raises(ValueError, match=f"AOAI_CAPTURE_NAME_FORMAT.*missing {{{token}}}"):
        NameFormat(DEFAULT_NAME_FORMAT.replace(f"{{{token}}}", "x"))


def test_unknown_tokens_are_an_error_that_names_all_of_them():
    with pytest.raises(ValueError, match=r"AOAI_CAPTURE_NAME_FORMAT.*unknown \{Hub\}, unknown \{Week\}, missing \{Day\}"):
        NameFormat("{Namespace}/{Hub}/{PartitionId}/{Year}/{Month}/{Week}/{Hour}/{Minute}/{Second}")


@pytest.mark.parametrize(
    "name",
    [
        "ns/hub/0/2026/02/30/04/05/06.avro",
        "ns/hub/0/2026/13/01/04/05/06.avro",
        "ns/hub/0/2026/03/01/24/05/06.avro",
        "ns/hub/0/2026/3/1/04/05/06.avro",
        "ns/hub/0/2026/03/01/04/05/06.parquet",
        "ns/hub/0/2026/03/01/04/05/06",
        "ns/hub/0/2026/03/01/04/05.avro",
        "other/ns/hub/0/2026/03/01/04/05/06.avro",
        "ns/hub/0/2026/03/01/04/05/06.avro.tmp",
    ],
)
def test_other_blobs_are_not_capture_files(name):
    assert NameFormat(DEFAULT_NAME_FORMAT).parse(stored(name)) is None


WINDOWS = [
    dt.datetime.combine(day, time)
    for day in [
        *(dt.date(2025, 12, 30) + dt.timedelta(n) for n in range(4)),
        *(dt.date(2026, 1, 30) + dt.timedelta(n) for n in range(3)),
        *(dt.date(2026, 2, 27) + dt.timedelta(n) for n in range(4)),
        dt.date(2027, 1, 1),
    ]
    for time in (dt.time(0, 0, 0), dt.time(23, 57, 12))
]
RANGES = [
    ("2026-01-31", "2026-01-31"),
    ("2026-02-28", "2026-03-01"),
    ("2025-12-31", "2026-01-01"),
    ("2025-12-30", "2026-01-02"),
    ("2026-01-31", "2026-02-28"),
    ("2026-12-28", "2027-01-01"),
    ("2026-03-03", "2026-12-31"),
    ("2026-03-02", "2026-03-01"),
    ("2025-11-01", "2025-12-30"),
]


@pytest.mark.parametrize("text", FORMATS)
def test_a_range_of_days_finds_exactly_its_files(store_url, text):
    names, store = NameFormat(text), open_store(*store_url, create=True)
    windows = {names.name("ns", "hub", partition, window): window for window in WINDOWS for partition in ("0", "11")}
    others = [
        "readme.txt",
        "ns/hub/0/2026/01/31/notes.txt",
        "ns/readme.avro",
        "2026-01-31/x.avro",
        "ns/hub/0/2026/01/31/00/00/00.avro.tmp",
        "0/1/2/3/x",
    ]
    for name in [*windows, *others]:
        store.write(name, b"", replacing=None)
    for first, last in ((dt.date.fromisoformat(first), dt.date.fromisoformat(last)) for first, last in RANGES):
        found = list(names.files(store, first, last))
        assert sorted(file.object.name for file in found) == sorted(name for name, window in windows.items() if first <= window.date() <= last)
        assert all(windows[file.object.name] == file.window_start and file.object.etag for file in found)
