"""An Azure Blob container, or a folder inside one, as an object store."""

import concurrent.futures
import hashlib
import shutil
import tempfile
import urllib.parse
import uuid
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceExistsError, ResourceNotFoundError, ServiceRequestError
from azure.storage.blob import BlobPrefix, BlobProperties, BlobServiceClient, ContainerClient

from aoai_usage_pipeline.storage.store import Changed, NotFound, StorageError, StoredObject

_DOWNLOADS = 8
_SCOPE = "https://storage.azure.com/.default"


class BlobStore:
    """Objects are block blobs; a replacement is a conditional PUT with If-Match or If-None-Match.

    Signs in with `DefaultAzureCredential`; a connection string is taken only for an emulator.
    """

    def __init__(self, url: str, connection_string: str | None = None, *, create: bool) -> None:
        account_url, container, folder = split(url)
        self.url = url.rstrip("/")
        self._folder = f"{folder}/" if folder else ""
        try:
            self._container = _container_client(account_url, container, connection_string)
            if not self._container.exists(retry_connect=1):
                if not create:
                    raise StorageError(f"container {container} does not exist in {account_url}")
                self._container.create_container()
        except ResourceExistsError:
            pass
        except ServiceRequestError as error:
            raise StorageError(f"{account_url} cannot be reached: {error.message}") from error
        except HttpResponseError as error:
            if error.status_code in (401, 403):
                raise StorageError(f"{account_url} refused access to container {container}: {error.reason} ({error.status_code})") from error
            if isinstance(error, ClientAuthenticationError):
                raise StorageError(f"no sign-in for {account_url}: {error.message}") from error
            raise
        self._local = Path(tempfile.mkdtemp(prefix="aoai-usage-"))
        weakref.finalize(self, shutil.rmtree, self._local, ignore_errors=True)

    def objects(self, prefix: str = "") -> Iterator[StoredObject]:
        for blob in self._container.list_blobs(name_starts_with=self._folder + prefix):
            yield self._describe(blob)

    def children(self, prefix: str = "") -> tuple[list[str], list[StoredObject]]:
        folders: list[str] = []
        objects: list[StoredObject] = []
        for item in self._container.walk_blobs(name_starts_with=self._folder + prefix, delimiter="/"):
            if isinstance(item, BlobPrefix):
                folders.append(item.name.removeprefix(self._folder))
            else:
                objects.append(self._describe(item))
        return folders, objects

    def read(self, name: str) -> tuple[bytes, str]:
        try:
            download = self._container.download_blob(self._folder + name)
            return download.readall(), _plain(download.properties.etag)
        except ResourceNotFoundError:
            raise NotFound(f"{self.url}/{name} does not exist") from None

    def tail(self, name: str, size: int) -> tuple[bytes, str]:
        blob = self._container.get_blob_client(self._folder + name)
        try:
            properties = blob.get_blob_properties()
            download = blob.download_blob(
                offset=max(0, properties.size - size), length=size, etag=properties.etag, match_condition=MatchConditions.IfNotModified
            )
            return download.readall(), _plain(properties.etag)
        except ResourceNotFoundError:
            raise NotFound(f"{self.url}/{name} does not exist") from None

    def etag(self, name: str) -> str | None:
        try:
            return _plain(self._container.get_blob_client(self._folder + name).get_blob_properties().etag)
        except ResourceNotFoundError:
            return None

    def write(self, name: str, content: bytes | Path, *, replacing: str | None) -> str:
        condition: dict[str, Any] = {"etag": replacing, "match_condition": MatchConditions.IfNotModified} if replacing else {"overwrite": False}
        data = content.read_bytes() if isinstance(content, Path) else content
        try:
            answer = self._container.get_blob_client(self._folder + name).upload_blob(data, **({"overwrite": True} | condition))
        except (ResourceExistsError, ResourceNotFoundError):
            raise Changed(f"{self.url}/{name} was replaced by another run") from None
        except HttpResponseError as error:
            if error.status_code == 412:
                raise Changed(f"{self.url}/{name} was replaced by another run") from None
            raise
        finally:
            if isinstance(content, Path):
                content.unlink()
        return _plain(answer["etag"])

    def delete(self, name: str) -> None:
        try:
            self._container.delete_blob(self._folder + name)
        except ResourceNotFoundError:
            return

    def staging(self) -> Path:
        return self._local

    def collect_staging(self) -> None:
        """Nothing to do: the staging folder ends with the process."""

    def local_paths(self, names: Iterable[str]) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as pool:
            return list(pool.map(self._download, names))

    def _download(self, name: str) -> str:
        etag = self.etag(name)
        if etag is None:
            raise NotFound(f"{self.url}/{name} does not exist")
        path = self._local / f"{hashlib.sha256(f'{name} {etag}'.encode()).hexdigest()}.parquet"
        if not path.exists():
            content, _ = self.read(name)
            part = self._local / uuid.uuid4().hex
            part.write_bytes(content)
            part.replace(path)
        return str(path)

    def _describe(self, blob: BlobProperties) -> StoredObject:
        return StoredObject(blob.name.removeprefix(self._folder), _plain(blob.etag), blob.size, blob.last_modified)


def _plain(etag: str) -> str:
    # listings give the ETag without quotes, answers to single requests with them
    return etag.strip('"')


def split(url: str) -> tuple[str, str, str]:
    """Account URL, container and folder; emulators put the account into the path."""
    parts = urllib.parse.urlsplit(url)
    path = [urllib.parse.unquote(part) for part in parts.path.split("/") if part]
    account = [] if is_azure(url) else path[:1]
    rest = path[len(account) :]
    if not rest:
        raise StorageError(f"{url} names no container: expected https://<account>.blob.core.windows.net/<container>")
    return "/".join([f"{parts.scheme}://{parts.netloc}", *account]), rest[0], "/".join(rest[1:])


def is_azure(url: str) -> bool:
    """Whether the URL is one of Azure's and not an emulator's."""
    return ".blob." in (urllib.parse.urlsplit(url).hostname or "")


def _container_client(account_url: str, container: str, connection_string: str | None) -> ContainerClient:
    if is_azure(account_url):
        from azure.identity import DefaultAzureCredential

        credential = DefaultAzureCredential()
        credential.get_token(_SCOPE)  # the client would try again for more than a minute before it says that nobody is signed in
        return ContainerClient(account_url, container, credential=credential)
    if not connection_string:
        raise StorageError(f"{account_url} is not an Azure endpoint: set AZURE_STORAGE_CONNECTION_STRING to the emulator's")
    try:
        service = BlobServiceClient.from_connection_string(connection_string)
    except ValueError as error:
        raise StorageError(f"AZURE_STORAGE_CONNECTION_STRING is not a connection string: {error}") from None
    endpoint = service.url.partition("?")[0]  # behind it is the signature, if the string has one
    if endpoint.rstrip("/") != account_url.rstrip("/"):
        raise StorageError(f"AZURE_STORAGE_CONNECTION_STRING is for {endpoint}, but the container is at {account_url}")
    return service.get_container_client(container)
