"""The docs say what the code does."""

import importlib.util

from aoai_usage_pipeline.settings import Settings, environment_variable
from aoai_usage_pipeline_tests.conftest import ROOT


def test_generated_pages_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    assert {path: path.read_text() for path in pages} == pages, "run make docs"
    assert set((ROOT / "docs/contracts").iterdir()) <= set(pages)


def test_every_setting_is_documented():
    text = (ROOT / "docs/settings.md").read_text()
    for field in Settings.__dataclass_fields__:
        assert f"`{environment_variable(field)}`" in text


def test_locks_name_no_index():
    for lock in ROOT.glob("requirements*.lock"):
        for line in lock.read_text().splitlines():
            assert line.startswith("#") or ("==" in line and "://" not in line and "@" not in line), line
