"""28,185 real Azure LLM requests, as capture files, bill to the independently computed cent and token."""

import csv
import datetime as dt
import gzip
import uuid
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import pytest

from aoai_usage_pipeline_tests.support import Captured, blob_name, capture_file, chat, installation, put, reference, rows, run_all, seed_event

DATA = Path(__file__).parent / "data"
DAY = dt.date(2023, 11, 16)
# odd prices, so that every token shows in the last digits
PRICES = {"code": (Decimal("2.500000007"), Decimal("10.000000003")), "conv": (Decimal("0.150000001"), Decimal("0.600000009"))}


def trace(name: str) -> list[tuple[dt.datetime, int, int]]:
    with gzip.open(DATA / f"AzureLLMInferenceTrace_{name}.csv.gz", "rt") as file:
        return [
            (dt.datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_real_traffic_is_billed_exactly(tmp_path):
    header = (
        "price_id,model,model_version,deployment_sku,region,service_tier,context_band,meter,unit_price,unit_tokens,currency,"
        "effective_from,effective_to,meter_id,source"
    )
    lines = [
        f"{name}-{meter},{name},,,,,,{meter},{price},1000000,USD,,,,"
        for name, prices in PRICES.items()
        for meter, price in zip(("input", "output"), prices, strict=True)
    ]
    deployments = [
        "gateway,subscription_id,product,operation,deployment,reported_model,model,model_version,deployment_sku,region,effective_from,effective_to"
    ] + [f",{name},,,,,{name},,,,," for name in PRICES]
    reference(tmp_path / "reference", price_book="\n".join([header, *lines]), deployments="\n".join(deployments))
    pipeline = installation(tmp_path, start_date=dt.date(2023, 11, 1))

    windows: dict[dt.datetime, list[Captured]] = defaultdict(list)
    expected: dict[str, list[Decimal]] = {}
    number = 0
    for name, (input_price, output_price) in PRICES.items():
        requests = trace(name)
        prompt, completion = sum(r[1] for r in requests), sum(r[2] for r in requests)
        cost = (prompt * input_price + completion * output_price) / 1_000_000
        expected[name] = [Decimal(len(requests)), Decimal(prompt), Decimal(completion), cost]
        for at, context_tokens, generated_tokens in requests:
            body = seed_event(str(uuid.UUID(int=number)), at, chat(context_tokens, generated_tokens), SubscriptionId=name)
            window = at.replace(minute=at.minute // 5 * 5, second=0, microsecond=0)
            windows[window].append(Captured(body, at, number))
            number += 1
    assert number == 28_185
    for window, events in windows.items():
        put(tmp_path / "capture", blob_name(window), capture_file(events))

    run_all(pipeline, DAY, DAY)

    billed = rows(pipeline, "SELECT model, sum(requests), sum(prompt_tokens), sum(completion_tokens), sum(cost) FROM daily_usage GROUP BY 1")
    assert {model: [Decimal(value) for value in values] for model, *values in billed} == expected
    [(cost,)] = rows(pipeline, "SELECT sum(cost) FROM daily_billing")
    assert cost == sum(figures[3] for figures in expected.values())
