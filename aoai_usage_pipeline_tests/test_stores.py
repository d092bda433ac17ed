"""Both stores keep the same promises: whole objects, conditional replacement, listings of nothing but objects."""

import concurrent.futures
import datetime as dt
import os
import threading
from pathlib import Path

import pytest
from azure.core.credentials import AccessToken
from azure.identity import CredentialUnavailableError, DefaultAzureCredential

from aoai_usage_pipeline.lake.held import Held
from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore, StorageError, open_store
from aoai_usage_pipeline.storage.blob import _container_client

ODD_NAMES = ["with space.txt", "é/ü/日本.txt", "hash#fragment.txt", "percent%20encoded.txt", "a=b/c+d&e.txt", "quote'd.txt", "question?mark.txt"]
EMULATOR_KEY = "bm90LWEtcmVhbC1rZXk="


@pytest.fixture
def store(store_url: tuple[str, str | None]) -> ObjectStore:
    return open_store(*store_url, create=True)


def put(store: ObjectStore, *names: str) -> None:
    for name in names:
        store.write(name, name.encode(), replacing=None)


def names(store: ObjectStore, prefix: str = "") -> list[str]:
    return sorted(stored.name for stored in store.objects(prefix))


def test_what_was_written_is_read_back_with_the_etag_of_the_write(store):
    etag = store.write("a/b.txt", b"one", replacing=None)
    assert store.read("a/b.txt") == (b"one", etag)
    assert store.etag("a/b.txt") == etag


def test_an_empty_object_is_an_object(store):
    etag = store.write("empty", b"", replacing=None)
    assert store.read("empty") == (b"", etag)
    assert names(store) == ["empty"]


def test_a_listing_describes_objects_as_a_read_does(store):
    before = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
    etag = store.write("a/b.txt", b"four", replacing=None)
    [listed] = store.objects()
    [child] = store.children("a/")[1]
    assert listed == child
    assert (listed.name, listed.etag, listed.size) == ("a/b.txt", etag, 4)
    assert before < listed.modified < before + dt.timedelta(minutes=5)


def test_every_replacement_has_an_etag_of_its_own_even_with_equal_content(store):
    etags: list[str | None] = [None]
    for _ in range(50):
        etags.append(store.write("x", b"same", replacing=etags[-1]))
    assert len(set(etags)) == len(etags)
    assert store.read("x") == (b"same", etags[-1])


def test_a_create_only_write_leaves_an_existing_object_alone(store):
    etag = store.write("x", b"old", replacing=None)
    with pytest.raises(Changed, match="x was replaced by another run"):
        store.write("x", b"new", replacing=None)
    assert store.read("x") == (b"old", etag)


def test_a_stale_etag_replaces_nothing(store):
    first = store.write("x", b"one", replacing=None)
    second = store.write("x", b"two", replacing=first)
    with pytest.raises(Changed):
        store.write("x", b"three", replacing=first)
    assert store.read("x") == (b"two", second)


def test_a_replacement_of_a_deleted_object_creates_nothing(store):
    etag = store.write("x", b"one", replacing=None)
    store.delete("x")
    with pytest.raises(Changed):
        store.write("x", b"two", replacing=etag)
    assert store.etag("x") is None


def test_a_staged_file_is_taken_over_whether_or_not_the_write_succeeds(store):
    def staged(content: bytes) -> Path:
        path = store.staging() / f"{content.decode()}.parquet"
        path.write_bytes(content)
        return path

    first, second = staged(b"first"), staged(b"second")
    etag = store.write("x", first, replacing=None)
    with pytest.raises(Changed):
        store.write("x", second, replacing=None)
    assert store.read("x") == (b"first", etag)
    assert not first.exists()
    assert not second.exists()


def test_of_concurrent_writers_exactly_one_wins_every_time(store_url):
    stores = [open_store(*store_url, create=True) for _ in range(4)]
    together = threading.Barrier(len(stores))

    def attempt(number: int, etag: str | None) -> int | None:
        together.wait()
        try:
            stores[number].write("x", f"new {number}".encode(), replacing=etag)
        except Changed:
            return None
        return number

    with concurrent.futures.ThreadPoolExecutor(len(stores)) as pool:
        for _ in range(40):
            etag = stores[0].etag("x")
            winners = [n for n in pool.map(attempt, range(len(stores)), [etag] * len(stores)) if n is not None]
            assert len(winners) == 1
            assert stores[0].read("x")[0] == f"new {winners[0]}".encode()


def test_delete_is_idempotent(store):
    put(store, "a/x", "a/y")
    store.delete("a/x")
    store.delete("a/x")
    store.delete("never/was")
    assert names(store) == ["a/y"]


def test_a_missing_object_is_not_found_by_its_name(store):
    put(store, "a")
    for missing in ("nothing", "a/below-an-object", "folder/nothing"):
        assert store.etag(missing) is None
        with pytest.raises(NotFound, match=missing):
            store.read(missing)
        with pytest.raises(NotFound, match=missing):
            store.local_paths(["a", missing])


def test_objects_lists_what_is_below_the_prefix_at_any_depth(store):
    put(store, "top", "a/x", "a/b/y", "a/b/c/z", "ab/w")
    assert names(store) == ["a/b/c/z", "a/b/y", "a/x", "ab/w", "top"]
    assert names(store, "a/") == ["a/b/c/z", "a/b/y", "a/x"]
    assert names(store, "a/b/") == ["a/b/c/z", "a/b/y"]
    assert names(store, "none/") == []


def test_children_gives_folders_and_objects_directly_below(store):
    put(store, "top", "a/x", "a/b/y", "a/b/c/z", "a/d/v", "ab/w")

    def children(prefix: str = "") -> tuple[list[str], list[str]]:
        folders, objects = store.children(prefix)
        return sorted(folders), sorted(stored.name for stored in objects)

    assert children() == (["a/", "ab/"], ["top"])
    assert children("a/") == (["a/b/", "a/d/"], ["a/x"])
    assert children("a/b/c/") == ([], ["a/b/c/z"])
    assert children("none/") == ([], [])


def test_local_paths_hold_the_content_of_now_in_the_order_asked(store):
    put(store, "a/x", "b/x", "c")
    assert [Path(path).read_bytes() for path in store.local_paths(["c", "a/x", "b/x"])] == [b"c", b"a/x", b"b/x"]
    store.write("c", b"replaced", replacing=store.etag("c"))
    assert [Path(path).read_bytes() for path in store.local_paths(["c"])] == [b"replaced"]
    assert store.local_paths([]) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_kept_as_they_are(store, name):
    etag = store.write(f"folder/{name}", b"content", replacing=None)
    assert store.read(f"folder/{name}") == (b"content", etag)
    assert names(store) == [f"folder/{name}"]
    assert Path(store.local_paths([f"folder/{name}"])[0]).read_bytes() == b"content"
    newer = store.write(f"folder/{name}", b"newer", replacing=etag)
    assert store.etag(f"folder/{name}") == newer
    store.delete(f"folder/{name}")
    assert names(store) == []


def test_odd_folder_names_are_listed_so_that_they_can_be_listed_again(store):
    put(store, "sp ace/é#/100%25/x")
    prefix = ""
    for _ in range(3):
        [prefix] = store.children(prefix)[0]
    assert prefix == "sp ace/é#/100%25/"
    assert names(store, prefix) == ["sp ace/é#/100%25/x"]


def test_a_store_below_another_one_sees_only_its_part(store, store_url):
    url, connection_string = store_url
    below = open_store(f"{url}/some/folder/", connection_string, create=True)
    put(store, "some/other")
    put(below, "x/y")
    assert names(below) == ["x/y"]
    assert below.children()[0] == ["x/"]
    assert names(store) == ["some/folder/x/y", "some/other"]
    below.delete("x/y")
    assert names(store) == ["some/other"]


def test_a_missing_place_is_an_error_with_its_name_where_we_read(store_url):
    url, connection_string = store_url
    with pytest.raises(StorageError, match=url.rpartition("/")[2]):
        open_store(url, connection_string, create=False)
    open_store(url, connection_string, create=True)
    assert names(open_store(url, connection_string, create=False)) == []
    assert names(open_store(url, connection_string, create=True)) == []


def test_the_folder_of_a_url_can_be_a_file_url(tmp_path):
    open_store(f"file://{tmp_path}/store", create=True).write("x", b"1", replacing=None)
    assert (tmp_path / "store" / "x").read_bytes() == b"1"


def test_a_folder_never_lists_its_own_files_and_dot_files(tmp_path):
    store = open_store(str(tmp_path), create=True)
    put(store, "a/x")
    (store.staging() / "half-written.parquet").write_bytes(b"?")
    for hidden in (".DS_Store", "a/.x.swp", ".git/config", "a/.hidden/y"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"?")
    assert names(store) == ["a/x"]
    assert store.children()[0] == ["a/"]
    assert names(store, "a/") == ["a/x"]


def test_old_leftovers_of_killed_runs_are_collected_and_young_ones_are_not(tmp_path):
    store = open_store(str(tmp_path), create=True)
    old, young = store.staging() / "old", store.staging() / "young"
    for path in (old, young):
        path.write_bytes(b"?")
    two_days_ago = dt.datetime.now(dt.UTC).timestamp() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    store.collect_staging()
    assert not old.exists()
    assert young.exists()


def test_a_connection_string_for_another_endpoint_is_refused_without_showing_its_key():
    connection_string = f"AccountName=devstoreaccount1;AccountKey={EMULATOR_KEY};BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;"
    with pytest.raises(StorageError) as error:
        open_store("http://127.0.0.1:9999/devstoreaccount1/lake", connection_string, create=True)
    assert "AZURE_STORAGE_CONNECTION_STRING is for http://127.0.0.1:10000/devstoreaccount1" in str(error.value)
    assert "http://127.0.0.1:9999/devstoreaccount1" in str(error.value)
    assert EMULATOR_KEY not in str(error.value)
    signed = "BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;SharedAccessSignature=sv=2026-01-01&sig=s3cret"
    with pytest.raises(StorageError, match=r"is for http://127.0.0.1:10000/devstoreaccount1/, but") as error:
        open_store("http://127.0.0.1:9999/devstoreaccount1/lake", signed, create=True)
    assert "s3cret" not in str(error.value)


def test_an_emulator_without_a_connection_string_is_an_error_that_names_the_setting():
    with pytest.raises(StorageError, match="AZURE_STORAGE_CONNECTION_STRING"):
        open_store("http://127.0.0.1:9999/devstoreaccount1/lake", create=True)


@pytest.mark.parametrize(
    "url", ["https://account.blob.core.windows.net", "https://account.blob.core.windows.net/", "http://127.0.0.1:10000/devstoreaccount1"]
)
def test_a_url_without_a_container_is_an_error(url):
    with pytest.raises(StorageError, match="names no container"):
        open_store(url, create=True)


def test_an_azure_endpoint_is_signed_in_to_with_the_default_credential_whatever_connection_string_is_set(monkeypatch):
    monkeypatch.setattr(DefaultAzureCredential, "get_token", lambda self, *scopes: AccessToken("token", 0))
    endpoint = "https://account.blob.core.windows.net"
    client = _container_client(endpoint, "lake", f"AccountName=account;AccountKey={EMULATOR_KEY};BlobEndpoint={endpoint};")
    assert isinstance(client.credential, DefaultAzureCredential)
    assert client.url == f"{endpoint}/lake"


def test_nobody_signed_in_is_an_error_that_names_the_account(monkeypatch):
    def unavailable(self, *scopes):
        raise CredentialUnavailableError("Azure CLI not found on path")

    monkeypatch.setattr(DefaultAzureCredential, "get_token", unavailable)
    with pytest.raises(StorageError, match=r"^no sign-in for https://account.blob.core.windows.net: Azure CLI not found on path$"):
        open_store("https://account.blob.core.windows.net/capture", create=False)


def test_an_account_that_is_not_there_is_soon_an_error_that_names_it(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    endpoint = "http://127.0.0.1:9/devstoreaccount1"
    with pytest.raises(StorageError, match=f"^{endpoint} cannot be reached: "):
        open_store(f"{endpoint}/capture", f"AccountName=devstoreaccount1;AccountKey={EMULATOR_KEY};BlobEndpoint={endpoint};", create=False)
    assert 0 < sum(waited) < 30


@pytest.mark.slow
def test_a_refused_sign_in_is_an_error_that_names_the_account_and_not_the_key(azurite):
    endpoint, connection_string = azurite
    wrong = ";".join(f"AccountKey={EMULATOR_KEY}" if part.startswith("AccountKey") else part for part in connection_string.split(";"))
    with pytest.raises(StorageError, match=endpoint) as error:
        open_store(f"{endpoint}/lake", wrong, create=True)
    assert EMULATOR_KEY not in str(error.value)


def test_a_held_day_whose_note_is_damaged_is_still_held_and_the_others_keep_their_reasons(tmp_path):
    lake = open_store(str(tmp_path), create=True)
    held, first, second = Held(lake, "raw_events"), dt.date(2026, 10, 5), dt.date(2026, 10, 6)
    held.hold(first, "records differ", "")
    held.hold(second, "records differ", "")
    for content in (b"{", b"[]", b"{}"):
        lake.write("held/raw_events/2026-10-06.json", content, replacing=lake.etag("held/raw_events/2026-10-06.json"))
        assert held.reasons() == {first: "records differ", second: "unknown: held/raw_events/2026-10-06.json is damaged"}
