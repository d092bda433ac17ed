"""The settings of one installation, read once from the environment. Nothing else in the package reads environment variables."""

import dataclasses
import datetime as dt
import importlib.metadata
import importlib.util
import os
import re
import urllib.parse
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path

DEFAULT_NAME_FORMAT = "{Namespace}/{EventHub}/{PartitionId}/{Year}/{Month}/{Day}/{Hour}/{Minute}/{Second}"
EXAMPLE_REFERENCE_DIR = Path(__file__).parent / "reference" / "example"
_CHOICES = {"automation": ("stopped", "running")} | dict.fromkeys(("estimate_usage", "keep_content", "cosmos_usage", "drain"), ("off", "on"))


_OTHER_NAMES = {
    "storage_connection_string": "AZURE_STORAGE_CONNECTION_STRING",
    "applicationinsights_connection_string": "APPLICATIONINSIGHTS_CONNECTION_STRING",
}


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names the variable."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where things are and when they start. Relative paths are relative to the current folder."""

    capture_url: str = "./data/capture"
    capture_name_format: str = DEFAULT_NAME_FORMAT
    lake_url: str = "./data/lake"
    warehouse_path: str = "./data/aoai_usage.duckdb"
    reference_dir: str = str(EXAMPLE_REFERENCE_DIR)
    start_date: dt.date = dt.date(2024, 1, 1)
    automation: str = "stopped"
    estimate_usage: str = "off"
    keep_content: str = "off"
    min_coverage: Decimal = Decimal("0.95")
    billing_currency: str | None = None
    cosmos_endpoint: str | None = None
    cosmos_database: str = "aoai-usage"
    cosmos_usage: str = "off"
    cosmos_key: str | None = dataclasses.field(default=None, repr=False)
    hash_key: str | None = dataclasses.field(default=None, repr=False)
    storage_connection_string: str | None = dataclasses.field(default=None, repr=False)
    event_hub_namespace: str | None = None
    event_hub_name: str | None = None
    event_hub_consumer_group: str = "$Default"
    event_hub_connection_string: str | None = dataclasses.field(default=None, repr=False)
    capture_minutes: int = 15
    drain: str = "off"
    applicationinsights_connection_string: str | None = dataclasses.field(default=None, repr=False)
    notify_webhook_url: str | None = dataclasses.field(default=None, repr=False)
    notify_event_hub: str | None = None
    ui_url: str | None = None
    runbook_url: str = "docs/runbook.md"

    def __post_init__(self) -> None:
        """Raises `SettingsError` for settings that only make sense together."""
        if self.notify_event_hub and self.notify_event_hub == self.event_hub_name:
            raise SettingsError("AOAI_NOTIFY_EVENT_HUB and AOAI_EVENT_HUB_NAME are the same hub: notifications would be taken for usage")
        if not self.event_hub_namespace or not self.event_hub_name:
            for field in ("namespace", "name", "connection_string"):
                if getattr(self, f"event_hub_{field}") and not (self.notify_event_hub and field != "name"):
                    raise SettingsError(f"AOAI_EVENT_HUB_{field.upper()} is set: a hub needs both AOAI_EVENT_HUB_NAMESPACE and AOAI_EVENT_HUB_NAME")
            if self.drain == "on":
                raise SettingsError("AOAI_DRAIN is 'on', which needs AOAI_EVENT_HUB_NAMESPACE and AOAI_EVENT_HUB_NAME")
            if self.notify_event_hub and not self.event_hub_namespace:
                raise SettingsError("AOAI_NOTIFY_EVENT_HUB is set, which needs AOAI_EVENT_HUB_NAMESPACE")

    @property
    def reference_in_container(self) -> bool:
        """Whether the reference data lies in a Blob container and not in a folder."""
        return self.reference_dir.startswith(("http://", "https://"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, **overrides: object) -> "Settings":
        """Settings from `AOAI_*` variables; blank means unset; `overrides` win. Raises `SettingsError`."""
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            name = environment_variable(field.name)
            text = env.get(name, "").strip()
            if not text:
                continue
            if field.name == "start_date":
                try:
                    values[field.name] = dt.date.fromisoformat(text)
                except ValueError:
                    raise SettingsError(f"AOAI_START_DATE is {text!r}: expected a date such as 2024-01-01") from None
            elif field.name == "min_coverage":
                try:
                    values[field.name] = share = Decimal(text)
                    valid = 0 <= share <= 1
                except InvalidOperation:
                    valid = False
                if not valid:
                    raise SettingsError(f"AOAI_MIN_COVERAGE is {text!r}: expected a share from 0 to 1, such as 0.95")
            elif field.name == "capture_minutes":
                if not re.fullmatch("[0-9]{1,4}", text):
                    raise SettingsError(f"AOAI_CAPTURE_MINUTES is {text!r}: expected a number of minutes such as 15")
                values[field.name] = int(text)
            elif field.name == "billing_currency" and not re.fullmatch("[A-Z]{3}", text):
                raise SettingsError(f"AOAI_BILLING_CURRENCY is {text!r}: expected an ISO 4217 code such as EUR")
            elif field.name == "cosmos_endpoint" and not re.fullmatch("https?://[^/]+/?", text):
                raise SettingsError(f"AOAI_COSMOS_ENDPOINT is {text!r}: expected an address such as https://youraccount.documents.azure.com:443/")
            elif field.name == "notify_webhook_url" and not re.fullmatch(r"https?://[!-~]+", text):
                raise SettingsError("AOAI_NOTIFY_WEBHOOK_URL is no address such as https://host/path; it is a secret and not shown")
            elif field.name == "ui_url" and not re.fullmatch(r"https?://[!-~]+", text):
                raise SettingsError(f"AOAI_UI_URL is {text!r}: expected an address such as https://dagster.example.com")
            elif text not in _CHOICES.get(field.name, (text,)):
                raise SettingsError(f"{name} is {text!r}: expected {' or '.join(map(repr, _CHOICES[field.name]))}")
            elif field.name == "estimate_usage" and text == "on" and not importlib.util.find_spec("bpe_openai"):
                raise SettingsError("AOAI_ESTIMATE_USAGE is 'on', which needs the extra `estimate`: pip install 'aoai-usage-pipeline[estimate]'")
            elif field.name == "applicationinsights_connection_string":
                ingestion_endpoint(text)
                if not _installed("azure-monitor-opentelemetry-exporter"):
                    raise SettingsError(f"{name} is set, which needs the extra `monitor`: pip install 'aoai-usage-pipeline[monitor]'")
                values[field.name] = text
            else:
                values[field.name] = text
        return cls(**{**values, **overrides})  # type: ignore[arg-type]


def environment_variable(field: str) -> str:
    """The environment variable that a field of `Settings` is read from."""
    return _OTHER_NAMES.get(field, f"AOAI_{field.upper()}")


def ingestion_endpoint(connection_string: str) -> str:
    """Where a connection string of Application Insights sends to. Raises `SettingsError`, which does not show the string."""
    parts = dict(part.split("=", 1) for part in connection_string.split(";") if "=" in part)
    fields = {name.strip().lower(): value.strip() for name, value in parts.items()}
    endpoint = urllib.parse.urlsplit(fields.get("ingestionendpoint", ""))
    secure = endpoint.scheme == "https" or (endpoint.scheme == "http" and endpoint.hostname in ("127.0.0.1", "localhost", "::1"))
    if not secure or not endpoint.hostname or not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", fields.get("instrumentationkey", "")):
        raise SettingsError(
            "APPLICATIONINSIGHTS_CONNECTION_STRING is not a connection string of Application Insights: "
            "expected InstrumentationKey=<uuid>;IngestionEndpoint=https://…, as the resource shows it"
        )
    return fields["ingestionendpoint"]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
