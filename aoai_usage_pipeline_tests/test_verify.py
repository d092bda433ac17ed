"""`aoai-usage verify` and the digest of a bill: the capture files give the same bill again, and a bill that was touched is found out."""

import datetime as dt
import json
import re
import tempfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aoai_usage_pipeline.billing import digest
from aoai_usage_pipeline.pipeline import Pipeline
from aoai_usage_pipeline_tests.support import (
    DAY,
    PRICE_BOOK,
    Captured,
    Run,
    blob_name,
    capture,
    capture_file,
    chat,
    hub_event,
    installation,
    lines,
    put,
    reference,
    run_all,
    seed_event,
    versions,
)

HOUR, ONE_DAY = dt.timedelta(hours=1), dt.timedelta(days=1)
BILL = ("bill", "--from", "2026-10-05", "--to", "2026-10-06")
VERIFY = ("verify", *BILL[1:])
FIRST, SECOND = "2026-10-05", "2026-10-06"


def two_days(root: Path) -> None:
    capture(root, DAY + HOUR, seed_event("a", DAY, chat(1_000_000, 100_000)), hub_event("b", DAY, 10, 5, 15, userId="somebody"), b"[broken]")
    capture(root, DAY + ONE_DAY + HOUR, seed_event("c", DAY + ONE_DAY, chat(10, 5)), first=4)


def bill(root: Path, first: str = FIRST) -> None:
    """Bill from a day on, with everything that was captured since."""
    run_all(installation(root), dt.date.fromisoformat(first), (DAY + 36 * ONE_DAY).date())


def stored_digest(root: Path, day: str = FIRST) -> str:
    footer, _ = installation(root).daily_tables().billing.footer(dt.date.fromisoformat(day))
    return str(footer["digest"])


def outcome(out: str, day: str) -> str:
    [line] = re.findall(rf"^(agrees|differs|cannot be verified) {day}: stored", out, re.MULTILINE)
    return line


def rewrite(root: Path, column: str, change: dict[int, object]) -> None:
    """Change values of the first day's lines, by place, and keep everything else of the file as it is."""
    path = root / f"lake/daily_billing/usage_date={FIRST}/data.parquet"
    table = pq.ParquetFile(path).read()
    values = table[column].to_pylist()
    for place, value in change.items():
        values[place] = value
    field = table.schema.field(column)
    pq.write_table(table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type)), path)


def test_capture_files_give_the_bill_that_is_stored_and_nothing_is_written(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    aoai_usage(*BILL)
    before = versions(root)
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 0
    for day in (FIRST, SECOND):
        found = stored_digest(root, day)
        assert f"agrees {day}: stored {found}, replayed {found}" in out
    assert "2 days agree, 0 differ, 0 cannot be verified" in out and "changed" not in out
    assert versions(root) == before


def test_a_line_that_was_touched_is_shown_with_both_figures(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    lines_of_day = pq.ParquetFile(root / f"lake/daily_billing/usage_date={FIRST}/data.parquet").read().to_pylist()
    place = next(n for n, line in enumerate(lines_of_day) if line["cost"] == Decimal("2.5"))
    rewrite(root, "cost", {place: Decimal("2.4")})
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 1
    assert (outcome(out, FIRST), outcome(out, SECOND)) == ("differs", "agrees")
    [[line]] = lines(out, " / ")
    assert line.startswith("2026-10 / apim / sales / Sales / CC-1 / ") and "/ input /" in line
    assert line.endswith(": stored cost 2.4; replayed cost 2.5")
    assert "are not the ones it was stored with" in out
    rewrite(root, "cost", {place: Decimal("2.5")})
    assert aoai_usage(*VERIFY)[0] == 0


def test_a_line_that_is_missing_and_one_too_many_are_shown_and_only_the_first_twenty(root: Path, aoai_usage: Run) -> None:
    capture(root, DAY + HOUR, *(hub_event(f"r{n}", DAY, 10, 0, 10, deploymentName=f"d{n:02}") for n in range(25)))
    bill(root)
    rewrite(root, "deployment", {0: "elsewhere"})
    _, out, _ = aoai_usage(*VERIFY)
    [[gone]] = lines(out, "/ d00 /")
    assert "stored no such line; replayed quantity 10" in gone
    [[extra]] = lines(out, "/ elsewhere /")
    assert "stored quantity 10" in extra and extra.endswith("; replayed no such line")
    rewrite(root, "deployment", {n: f"x{n}" for n in range(25)})
    _, out, _ = aoai_usage(*VERIFY)
    assert len(lines(out, " / ")) == 20 and "and 30 more lines" in out


def test_a_bill_that_was_stored_with_another_digest_differs(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    path = root / f"lake/daily_billing/usage_date={FIRST}/data.parquet"
    table = pq.ParquetFile(path).read()
    footer = json.loads(table.schema.metadata[b"aoai_usage"])
    pq.write_table(table.replace_schema_metadata({b"aoai_usage": json.dumps(footer | {"digest": "0" * 64}).encode()}), path)
    code, out, _ = aoai_usage(*VERIFY)
    assert (code, outcome(out, FIRST)) == (1, "differs") and "0" * 64 in out
    del footer["digest"]
    pq.write_table(table.replace_schema_metadata({b"aoai_usage": json.dumps(footer).encode()}), path)
    code, out, _ = aoai_usage(*VERIFY)
    assert (code, outcome(out, FIRST)) == (1, "cannot be verified") and "without a digest" in out
    path.write_bytes(b"PAR1 nothing PAR1")
    code, out, _ = aoai_usage(*VERIFY)
    assert (code, outcome(out, FIRST)) == (1, "cannot be verified")


def test_capture_files_that_are_gone_are_named_and_their_days_cannot_be_verified(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    again = capture(root, DAY + 2 * HOUR, seed_event("a", DAY, chat(1_000_000, 100_000)), first=9)
    bill(root)
    # it only had a copy, so the bill is the same without it, but that is not known before it is read
    again.unlink()
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 1
    assert (outcome(out, FIRST), outcome(out, SECOND)) == ("cannot be verified", "agrees")
    assert len(lines(out, "gone", blob_name(DAY + 2 * HOUR))) == 2
    assert "1 days agree, 0 differ, 1 cannot be verified" in out


def test_a_day_whose_requests_have_copies_in_a_file_that_is_gone_cannot_be_verified(root: Path, aoai_usage: Run) -> None:
    # the copy of the next day was first at the hub, so the request counts there
    capture(root, DAY + HOUR, seed_event("a", DAY + ONE_DAY, chat(10, 5)))
    capture(root, DAY + 2 * HOUR, seed_event("a", DAY, chat(10, 5)), seed_event("b", DAY, chat(1, 1)), first=2)
    bill(root)
    (root / "capture" / blob_name(DAY + HOUR)).unlink()
    code, out, _ = aoai_usage("verify", "--from", FIRST, "--to", FIRST)
    assert (code, outcome(out, FIRST)) == (1, "cannot be verified")
    assert lines(out, "gone", blob_name(DAY + HOUR))


def test_late_copies_from_far_away_are_read_too(root: Path, aoai_usage: Run) -> None:
    # the copy of r that has usage is of another month, so r does not count on the 5th
    capture(root, DAY + HOUR, seed_event("r", DAY, None), seed_event("s", DAY, chat(10, 5)))
    capture(root, DAY + 30 * ONE_DAY, seed_event("r", DAY + 30 * ONE_DAY, chat(7, 7)), first=3)
    capture(root, DAY + 35 * ONE_DAY, seed_event("late", DAY, chat(100, 5)), first=4)
    bill(root)
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 0, out
    assert len(lines(out, "verifying: read every capture file (3/3)")) == 1


def test_a_day_is_replayed_with_the_reference_data_it_was_billed_with(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    reference(root / "reference", PRICE_BOOK.replace("2.50", "3.50"))
    bill(root, SECOND)
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 0
    [version] = re.findall("billed with reference data version ([0-9a-f]+), which is not that of now", out)
    [recorded] = [path for path in (root / "lake/reference_versions").iterdir() if path.stem == version]
    recorded.unlink()
    code, out, _ = aoai_usage(*VERIFY)
    assert code == 1
    assert (outcome(out, FIRST), outcome(out, SECOND)) == ("differs", "agrees")
    assert f"version {version}, is not recorded: replayed with that of now" in out


def test_capture_files_that_came_since_are_named(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    capture(root, DAY + 5 * HOUR, seed_event("new", DAY, chat(10, 5)), first=9)
    code, out, _ = aoai_usage(*VERIFY)
    assert (code, outcome(out, FIRST)) == (1, "differs")
    assert len(lines(out, "changed", FIRST)) == 1 and not lines(out, "changed", SECOND)


def test_a_day_that_is_gone_from_the_lake_differs_and_a_day_without_usage_agrees(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    (root / f"lake/daily_billing/usage_date={FIRST}/data.parquet").unlink()
    code, out, _ = aoai_usage("verify", "--from", FIRST, "--to", "2026-10-07")
    assert code == 1
    assert [outcome(out, day) for day in (FIRST, SECOND, "2026-10-07")] == ["differs", "agrees", "agrees"]
    assert "there is no bill of it" in out


def test_a_damaged_lake_is_an_error_that_names_the_object(root: Path, aoai_usage: Run) -> None:
    two_days(root)
    bill(root)
    [segment] = (root / f"lake/raw_events/capture_date={FIRST}").glob("hour=*.parquet")
    segment.write_bytes(b"PAR1 nothing PAR1")
    code, _, err = aoai_usage(*BILL, "--as-of", "2027-10-05")
    assert code == 2 and segment.name in err and "Traceback" not in err
    assert aoai_usage(*VERIFY)[0] == 0  # the capture files are whole, and so is the bill


def test_without_a_bill_there_is_nothing_to_verify(root: Path, aoai_usage: Run) -> None:
    code, out, err = aoai_usage(*VERIFY)
    assert (code, out) == (2, "") and "no bill" in err
    assert not (root / "lake/hash_key").exists()
    assert aoai_usage("verify", "--from", SECOND, "--to", FIRST)[0] == 2


def billed(root: Path, sent: list[tuple[str, int]], hours: dict[int, list[int]]) -> Pipeline:
    """An installation where each hour's capture file has these of the events (id and tokens), by place, and all was billed."""
    number = 0
    for hour, places in hours.items():
        captured = []
        for place in places:
            number += 1
            name, prompt = sent[place]
            captured.append(Captured(seed_event(name, DAY + place * 4 * HOUR, chat(prompt, 5)), DAY + place * 4 * HOUR, number))
        put(root / "capture", blob_name(DAY + hour * HOUR), capture_file(captured))
    pipeline = installation(root)
    run_all(pipeline, DAY.date(), (DAY + 3 * ONE_DAY).date())
    return pipeline


@pytest.mark.slow
@given(st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_the_digest_is_that_of_the_events_however_they_are_captured(data: st.DataObject) -> None:
    sent = [(f"r{n}", data.draw(st.integers(1, 10**7))) for n in range(data.draw(st.integers(1, 10)))]
    order = data.draw(st.permutations([*range(len(sent)), *data.draw(st.lists(st.sampled_from(range(len(sent))), max_size=5))]))
    cuts = data.draw(st.lists(st.sampled_from([60, 61, 70]), min_size=len(order), max_size=len(order)))
    shuffled = {hour: [place for place, cut in zip(order, cuts, strict=True) if cut == hour] for hour in cuts}
    with tempfile.TemporaryDirectory() as place:
        plain = billed(Path(place) / "plain", sent, {0: list(range(len(sent)))})
        other = billed(Path(place) / "other", sent, shuffled)
        one, again = (
            {day: footer["digest"] for day, (footer, _) in pipeline.daily_tables().billing.footers().items()} for pipeline in (plain, other)
        )
        assert one == again and one
        assert other.verify(list(one)).agrees
        last = (f"r{len(sent) - 1}", sent[-1][1] + 1)
        differing = billed(Path(place) / "differing", [*sent[:-1], last], {0: list(range(len(sent)))})
        assert {day: footer["digest"] for day, (footer, _) in differing.daily_tables().billing.footers().items()} != one


def test_the_digest_of_lines_is_what_its_definition_says() -> None:
    line = (dt.date(2026, 10, 5), 'é/"x"', None, "", 10, Decimal("0.000075000000000"))
    assert digest.canonical(line) == '["2026-10-05","é/\\"x\\"",null,"","10","0.000075"]'
    # sha256 of that line and a newline, and of the lines z and a in the other order
    assert digest.of_day([line]) == "a02bf218de3fd3814151a94a094b4028ea17c3ea664c9d24abb3caf58bfca2d0"
    assert digest.of_day([("z",), ("a",)]) == digest.of_day([("a",), ("z",)]) == "47dd4b992c7b3976819c40c7699a2b945e4d4d954646744963ab16c56b2dcd45"
    assert (
        digest.of_days({dt.date(2026, 10, 6): "2", dt.date(2026, 10, 5): "1"}) == "23148ba6fa5392a4cb7420202e9522dc27c501eacc4ff72ed3390996945ef52a"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("-0.000"), "0"),
        (Decimal("100"), "100"),
        (Decimal("100.00"), "100"),
        (Decimal("1E+3"), "1000"),
        (Decimal("-2.50"), "-2.5"),
        (Decimal("12345678901234567890123.123456789012345"), "12345678901234567890123.123456789012345"),
        (10**18, "1000000000000000000"),
    ],
)
def test_numbers_have_one_text_with_all_their_digits(value: object, text: str) -> None:
    assert digest.text(value) == text
