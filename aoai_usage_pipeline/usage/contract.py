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
    "reported_region",
    "status_code",
    "end_user",
    "service",
    "details",
    "part",
    "image_kind",
)
COUNT_COLUMNS = (
    "prompt_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "audio_prompt_tokens",
    "cached_audio_tokens",
    "image_prompt_tokens",
    "cached_image_tokens",
    "completion_tokens",
    "audio_completion_tokens",
    "image_completion_tokens",
    "reasoning_tokens",
    "total_tokens",
    "images",
    "characters",
)
TOOL_COLUMNS = ("web_search_calls", "file_search_calls", "code_interpreter_sessions")


@dataclasses.dataclass(frozen=True)
class Contract:
    """One kind of event body, in DuckDB SQL over the parsed body `e` (every leaf of `shape` is text, absent ones are NULL).

    Every body of the contract contains one of the texts `markers`, which avoids parsing the others. `matches` says whether a parsed body is
    of the contract. `fields` gives text columns; missing ones are NULL. Counts come from `counts`, or from `usage`, the JSON text of an
    OpenAI usage object; `response` is the text of a whole answer of Azure OpenAI, whose parts the other expressions then have as `a` (see
    `answers.SHAPE`). `placeholder` says that the counts stand for missing usage. `ignores` are fields that are known and not read; any other
    field is reported as new. `estimate` gives a usage object, as JSON text, for a call that reports neither usage nor counts; it reads the
    prompts and answers in `texts`, which have the form of `shape` and are parsed for nothing else. Of a body that the gateway cut off
    everything before the key `truncated_at` is read. `secrets` are keys whose values are written nowhere. `billable` is false for a record
    that is no request of its own and is kept as evidence only.
    """

    name: str
    markers: tuple[str, ...]
    shape: Mapping[str, object]
    matches: str
    fields: Mapping[str, str]
    usage: str | None = None
    response: str | None = None
    counts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    placeholder: str = "false"
    ignores: tuple[str, ...] = ()
    texts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    estimate: str | None = None
    truncated_at: str | None = None
    secrets: tuple[str, ...] = ()
    billable: bool = True

    def shape_json(self, *, with_texts: bool) -> str:
        """The shape to parse; the fields of prompts and answers only where they are asked for."""
        return json.dumps({**self.shape, **(self.texts if with_texts else {})})


@cache
def contracts() -> tuple[Contract, ...]:
    """Every contract of the package, in the order of their names: the first that matches reads the body."""
    from aoai_usage_pipeline.usage import contracts as package

    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"{package.__name__}.{name}").CONTRACT for name in modules)
