"""What an event contract is. Each contract is one module in `contracts/` with one `CONTRACT`; adding a contract is adding a file."""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Mapping
from functools import cache

TEXT_COLUMNS = (
    "request_id",
    "event_time",
    "gateway",
    "subscription_id",
    "product",
    "application",
    "operation",
    "deployment",
    "reported_model",
    "service_tier",
)
COUNT_COLUMNS = (
    "prompt_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "audio_prompt_tokens",
    "completion_tokens",
    "audio_completion_tokens",
    "reasoning_tokens",
    "total_tokens",
)


@dataclasses.dataclass(frozen=True)
class Contract:
    """One kind of event body, in DuckDB SQL over the parsed body `e` (every leaf of `shape` is text, absent ones are NULL).

    `marker` is text that every body of the contract contains, to avoid parsing the others. `matches` says whether a parsed body is of the
    contract. `fields` gives the text columns; missing ones are NULL. Counts come either from `counts`, or from `usage`, the JSON text of
    an OpenAI usage object. `placeholder` says that the counts stand for missing usage. `truncated` gives the text columns of a body that
    the gateway cut off, by the JSON keys to look for before the key `truncated_at`.
    """

    name: str
    marker: str
    shape: Mapping[str, object]
    matches: str
    fields: Mapping[str, str]
    usage: str | None = None
    counts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    placeholder: str = "false"
    truncated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    truncated_at: str = ""

    @property
    def shape_json(self) -> str:
        return json.dumps(self.shape)


@cache
def contracts() -> tuple[Contract, ...]:
    """Every contract of the package, in the order of their names: the first that matches reads the body."""
    from aoai_usage_pipeline.usage import contracts as package

    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"{package.__name__}.{name}").CONTRACT for name in modules)
