"""A real Azure bill by meter and day comes out exactly, with prices imported from the real price list."""

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

from aoai_usage_pipeline.reference.proposal import Book, Proposal
from aoai_usage_pipeline.reference.retail import Snapshot, snapshots
from aoai_usage_pipeline_tests import support
from aoai_usage_pipeline_tests.support import Captured, hub_event, rows

PRICES = Path(__file__).parent / "data" / "retail_prices_2025-08-25.json"
IN_4O, OUT_4O = "gpt 4o 0513 Input global Tokens", "gpt 4o 0513 Output global Tokens"
IN_MINI, OUT_MINI = "gpt-4o-mini-0718-Inp-glbl Tokens", "gpt-4o-mini-0718-Outp-glbl Tokens"
METERS = {
    IN_4O: ("gpt-4o-2024-05-13", "input"),
    OUT_4O: ("gpt-4o-2024-05-13", "output"),
    IN_MINI: ("gpt-4o-mini-2024-07-18", "input"),
    OUT_MINI: ("gpt-4o-mini-2024-07-18", "output"),
}
# EffectiveCost in USD by day and x_SkuMeterName of a FinOps hub, with the tokens of each, from microsoft/finops-toolkit (MIT),
# src/finley/multiagent_finley_aifoundrysdk/examplequestions_prompts/adxqueries.md
BILL = [
    ("2025-03-28", IN_4O, 467572, "2.33786"),
    ("2025-03-28", OUT_4O, 54722, "0.82083"),
    ("2025-03-29", OUT_4O, 67972, "1.01958"),
    ("2025-03-29", IN_4O, 783622, "3.91811"),
    ("2025-03-30", IN_4O, 673662, "3.36831"),
    ("2025-03-30", OUT_4O, 60946, "0.91419"),
    ("2025-03-31", OUT_4O, 124621, "1.869315"),
    ("2025-03-31", IN_4O, 1660301, "8.301505"),
    ("2025-04-01", IN_4O, 704830, "3.52415"),
    ("2025-04-01", IN_MINI, 13823, "0.00207345"),
    ("2025-04-01", OUT_MINI, 2274, "0.0013644"),
    ("2025-04-01", OUT_4O, 68433, "1.026495"),
    ("2025-04-02", IN_4O, 54956, "0.27478"),
    ("2025-04-02", OUT_4O, 4473, "0.067095"),
]


def requests(total: int, number: int) -> list[int]:
    """The tokens of so many requests, unequal, that add up to a total."""
    parts = [total * (n + 1) // (number * number) for n in range(number - 1)]
    return [*parts, total - sum(parts)]


def test_a_real_bill_comes_out_exactly(tmp_path: Path) -> None:
    support.reference(tmp_path / "reference", price_book="")
    (tmp_path / "reference" / "deployments.csv").write_text(f"{support.DEPLOYMENTS.splitlines()[0]}\nhub,,,,,,,,GlobalStandard,eastus,,\n")
    [listed] = snapshots(str(PRICES), dt.date(2025, 8, 25))
    book = Book(tmp_path / "reference" / "price_book.csv")
    proposal = Proposal(book, [Snapshot(listed.date, tuple(item for item in listed.items if item.meter_name in METERS))])
    assert len(proposal.new) == len(METERS)
    book.write()

    pipeline = support.installation(tmp_path, start_date=dt.date(2025, 1, 1))
    for day in sorted({day for day, *_ in BILL}):
        noon = dt.datetime.fromisoformat(f"{day}T12:00:00")
        bodies = []
        for _, meter, tokens, _ in (line for line in BILL if line[0] == day):
            model, direction = METERS[meter]
            for part in requests(tokens, 7):
                prompt, completion = (part, 0) if direction == "input" else (0, part)
                bodies.append(hub_event(f"{day} {meter} {len(bodies)}", noon, prompt, completion, part, model=model))
        content = support.capture_file(Captured(body, noon, number) for number, body in enumerate(bodies))
        support.put(tmp_path / "capture", support.blob_name(noon), content)
    support.run_all(pipeline, dt.date(2025, 3, 27), dt.date(2025, 4, 3))

    billed = rows(
        pipeline,
        "SELECT CAST(usage_date AS VARCHAR), model || '-' || model_version, meter, CAST(quantity AS BIGINT), cost, currency FROM daily_billing",
    )
    expected = [(day, *METERS[meter], tokens, Decimal(cost), "USD") for day, meter, tokens, cost in BILL]
    assert sorted(billed) == sorted(expected)
    meter_ids = json.loads(PRICES.read_text())
    named = {(entry.values["price_id"], entry.meter_id) for entry in proposal.new}
    assert {meter_id for _, meter_id in named} <= {item["meterId"] for item in meter_ids if item["meterName"] in METERS}
    assert {price_id for (price_id,) in rows(pipeline, "SELECT DISTINCT price_id FROM daily_billing")} == {price_id for price_id, _ in named}
