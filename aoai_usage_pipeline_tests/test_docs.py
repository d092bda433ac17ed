"""The docs say what the code does."""

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.settings import Settings
from aoai_usage_pipeline_tests.conftest import ROOT


def test_every_published_column_is_documented_as_declared():
    text = (ROOT / "docs/tables.md").read_text()
    for name, columns in tables.PUBLISHED.items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("|")][2:]
        assert rows == [f"| {c.name} | {c.type} | {c.description} |" for c in columns], name


def test_every_setting_is_documented():
    text = (ROOT / "docs/settings.md").read_text()
    for field in Settings.__dataclass_fields__:
        name = "AZURE_STORAGE_CONNECTION_STRING" if field == "storage_connection_string" else f"AOAI_{field.upper()}"
        assert f"`{name}`" in text


def test_locks_name_no_index():
    for lock in ROOT.glob("requirements*.lock"):
        for line in lock.read_text().splitlines():
            assert line.startswith("#") or ("==" in line and "://" not in line and "@" not in line), line
