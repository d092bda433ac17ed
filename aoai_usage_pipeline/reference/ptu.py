"""What one PTU carries of each model, and in which sizes provisioned throughput is deployed: public figures, in `ptu_models.csv`."""

import csv
import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from importlib import resources

REGIONAL = "ProvisionedManaged"


@dataclasses.dataclass(frozen=True, slots=True)
class PtuModel:
    """A model's figures. A unit is an uncached input token; an output token takes `output_ratio` of them."""

    model: str
    input_tpm_per_ptu: int
    output_ratio: int
    min_ptus: int
    step_ptus: int
    regional_min_ptus: int
    regional_step_ptus: int
    source: str
    as_of: str

    def sizes(self, deployment_sku: str) -> tuple[int, int]:
        """The smallest deployment of a type, and the step to larger ones, in PTUs."""
        return (self.regional_min_ptus, self.regional_step_ptus) if deployment_sku == REGIONAL else (self.min_ptus, self.step_ptus)

    def needed(self, units_per_minute: Fraction, deployment_sku: str) -> int:
        """The smallest deployment, in PTUs, that carries so many units a minute."""
        least, step = self.sizes(deployment_sku)
        return least + step * max(0, math.ceil((units_per_minute / self.input_tpm_per_ptu - least) / step))


@functools.cache
def ptu_models() -> Mapping[str, PtuModel]:
    """The figures of every model that is known, by its name."""
    text = resources.files("aoai_usage_pipeline.reference").joinpath("ptu_models.csv").read_text("utf-8")
    numbers = [field.name for field in dataclasses.fields(PtuModel) if field.type is int]
    return {row["model"]: PtuModel(**row | {name: int(row[name]) for name in numbers}) for row in csv.DictReader(text.splitlines())}  # type: ignore[arg-type]
