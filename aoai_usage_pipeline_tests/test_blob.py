"""The whole pipeline over Blob containers, for real: the same bill as over folders, however often it is made."""

import base64
import datetime as dt
import logging
import uuid

import duckdb
import pytest

from aoai_usage_pipeline.reference import ReferenceDataError
from aoai_usage_pipeline.storage import StorageError
from aoai_usage_pipeline_tests.support import (
    COST_CENTERS,
    DAY,
    PRICE_BOOK,
    Captured,
    blob_name,
    capture_file,
    chat,
    hub_event,
    installation,
    put,
    reference,
    rows,
    run_all,
    seed_event,
)

pytestmark = pytest.mark.slow


def test_containers_give_the_bill_that_folders_give(tmp_path, azurite):
    endpoint, connection_string = azurite
    reference(tmp_path / "reference")
    name = uuid.uuid4().hex
    local = installation(tmp_path / "local", reference_dir=str(tmp_path / "reference"))
    remote = installation(
        tmp_path / "remote",
        capture_url=f"{endpoint}/capture-{name}",
        lake_url=f"{endpoint}/lake-{name}/some/folder",
        reference_dir=f"{endpoint}/reference-{name}/csv",
        storage_connection_string=connection_string,
    )
    for file in (tmp_path / "reference").iterdir():
        put(remote.settings.reference_dir, file.name, file.read_bytes(), connection_string)
    late = DAY + dt.timedelta(days=1, hours=6)
    windows = {
        DAY: [Captured(seed_event("a", DAY, chat(1000, 50, 300)), DAY, 0), Captured(b"{", DAY, 1)],
        DAY + dt.timedelta(hours=1): [Captured(hub_event("b", DAY, "70", "7", "77"), DAY, 2)],
        late: [Captured(seed_event("c", DAY, chat(10, 5)), late, 3), Captured(seed_event("a", DAY, chat(1000, 50, 300)), late, 4)],
    }
    for window, events in windows.items():
        for pipeline in (local, remote):
            put(pipeline.settings.capture_url, blob_name(window), capture_file(events), pipeline.settings.storage_connection_string)

    tables = ("daily_usage", "daily_billing", "daily_quality", "enriched_usage", "quarantine")
    for _ in range(2):
        for pipeline in (local, remote):
            run_all(pipeline, DAY.date(), late.date())
        for table in tables:
            assert rows(remote, f"SELECT * FROM {table} ORDER BY ALL") == rows(local, f"SELECT * FROM {table} ORDER BY ALL"), table
    assert rows(remote, "SELECT sum(requests), sum(prompt_tokens) FROM daily_usage") == [(3, 1080)]
    assert remote.stale_usage_dates() == {}
    assert remote.changed_capture_dates(DAY.date(), late.date()) == {}

    [local_verdict], [verdict] = (pipeline.verify([DAY.date()]).verdicts for pipeline in (local, remote))
    assert verdict == local_verdict and verdict.outcome == "agrees"
    with remote.as_known([DAY.date()], dt.datetime.now(dt.UTC).replace(tzinfo=None)) as known, duckdb.connect(str(known.warehouse)) as db:
        assert db.execute("SELECT * FROM daily_billing ORDER BY ALL").fetchall() == rows(local, "SELECT * FROM daily_billing ORDER BY ALL")

    put(remote.settings.capture_url, blob_name(DAY), capture_file(windows[DAY][:1]), connection_string)
    assert list(remote.changed_capture_dates(DAY.date(), late.date())) == [DAY.date()]
    run_all(remote, DAY.date(), late.date())
    assert rows(remote, "SELECT count(*) FROM quarantine") == [(0,)]


def test_reference_data_in_a_container_is_read_anew_and_its_faults_name_it(tmp_path, azurite, monkeypatch, aoai_usage):
    endpoint, connection_string = azurite
    url = f"{endpoint}/reference-{uuid.uuid4().hex}"
    pipeline = installation(tmp_path, reference_dir=url, storage_connection_string=connection_string)
    with pytest.raises(StorageError, match=f"AOAI_REFERENCE_DIR: container {url.rsplit('/')[-1]} does not exist"):
        pipeline.reference()

    put(url, "cost_centers.csv", COST_CENTERS.encode(), connection_string)
    assert [row.values["cost_center"] for row in pipeline.reference().cost_centers] == ["CC-1", "CC-2"]
    assert pipeline.reference().price_book == ()

    put(url, "price_book.csv", PRICE_BOOK.replace("2.50", "ten").encode(), connection_string)
    with pytest.raises(ReferenceDataError) as error:
        pipeline.reference()
    assert str(error.value).startswith(f"{url}/price_book.csv: line 2, column unit_price:")

    monkeypatch.setenv("AOAI_REFERENCE_DIR", url)
    code, _, complaint = aoai_usage("prices", "import", "list.json")
    assert code == 2 and "download price_book.csv" in complaint


def test_logs_have_no_keys_and_no_content_at_any_level(tmp_path, azurite, caplog):
    caplog.set_level(logging.DEBUG)
    endpoint, connection_string = azurite
    key = connection_string.split("AccountKey=")[1].split(";")[0]
    name = uuid.uuid4().hex
    urls = {"capture_url": f"{endpoint}/capture-{name}", "lake_url": f"{endpoint}/lake-{name}"}
    pipeline = installation(tmp_path, **urls, storage_connection_string=connection_string, hash_key="a hash key nobody may see", keep_content="on")
    event = seed_event("r1", DAY, chat(10, 5), Prompt="a prompt nobody may see")
    put(pipeline.settings.capture_url, blob_name(DAY), capture_file([Captured(event, DAY, 0)]), connection_string)
    run_all(pipeline, DAY.date(), DAY.date())
    assert rows(pipeline, "SELECT sum(requests) FROM daily_usage") == [(1,)]
    said = "\n".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records)
    assert "'Authorization': 'REDACTED'" in said
    for secret in (key, base64.b64decode(key).hex(), "SharedKey", "sig=", "nobody may see", "prompt_tokens"):
        assert secret not in said
