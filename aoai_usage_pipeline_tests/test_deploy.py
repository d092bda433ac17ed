"""docs/deploy.md: what needs no Azure is run, what does is at least a script that names what there is."""

import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from aoai_usage_pipeline_tests.conftest import ROOT

PAGE = (ROOT / "docs/deploy.md").read_text()
BLOCKS = re.findall(r"(?ms)^```([^\n]*)\n(.*?)^```$", PAGE)
PRICES = ROOT / "aoai_usage_pipeline_tests/data/retail_prices_2025-08-25.json"


def blocks(mark: str) -> str:
    return "".join(text for info, text in BLOCKS if info == f"sh {mark}")


def test_what_it_costs_adds_up():
    page = (ROOT / "docs/costs.md").read_text()
    short, long = (page[page.index(heading) :].split("\n\n")[1].replace("*", "").splitlines()[2:] for heading in ("## The short", "## How the sums"))
    parts = {row.split("|")[1].strip(): [Decimal(cell.replace(",", "")) for cell in row.split("|")[2:5]] for row in long}
    total = parts.pop("sum")
    assert len(parts) == 11
    assert [sum(column) for column in zip(*parts.values(), strict=True)] == total
    rest = [all_of_it - gateway for all_of_it, gateway in zip(total, parts["API Management"], strict=True)]
    said = {
        row.split("|")[1].strip(): [Decimal(re.match(r"\s*([\d,]+)", cell)[1].replace(",", "")) for cell in row.split("|")[2:5]] for row in short[2:]
    }
    assert said == {
        name: [amount.quantize(Decimal(1)) for amount in amounts]
        for name, amounts in (("API Management", parts["API Management"]), ("everything else", rest), ("sum", total))
    }


@pytest.mark.slow
def test_what_needs_no_azure_runs(tmp_path):
    home = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PRICES": str(PRICES)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks("run")], cwd=tmp_path, env=home | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = done.stdout.split("Bill 2026-10-05 to 2026-10-06")[1:]
    assert "People Tools" in first and "Sales Engineering" in first
    assert "Sales Engineering" in second and "People Tools" not in second and "UNALLOCATED" in second
    [total] = re.findall(r"Total.* ([\d.]+ USD)", first)
    assert f" {total} " in second
    assert "2 days agree, 0 differ, 0 cannot be verified" in second
    assert "unallocated" in second and (tmp_path / "data/aoai_usage.duckdb").exists()


def test_every_block_is_marked_and_is_a_shell_script():
    assert {info for info, _ in BLOCKS} == {"sh run", "sh azure"}
    for _, text in BLOCKS:
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, f"{checked.stderr}\n{text}"


def test_files_apps_and_versions_that_the_page_names_are_there():
    azure = blocks("azure")
    for file in set(re.findall(r"\binfra/[\w./-]+\.(?:bicep|json|sh|yaml)\b", azure)):
        assert (ROOT / file).exists(), file
    apps = (ROOT / "infra/modules/container-apps.bicep").read_text()
    for app in set(re.findall(r"--name aoai-usage(-\w+)", azure)):
        assert f"'${{namePrefix}}{app}'" in apps, app
    [version] = re.findall(r"(?m)^dagster==(.+)$", (ROOT / "requirements.lock").read_text())
    assert f"--version {version}" in azure
    assert f"version {version}" in (ROOT / "infra/kubernetes/values.yaml").read_text().splitlines()[0]


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for anchor in re.findall(r"\]\((?:[\w./-]*deploy\.md)?#([\w-]+)\)", PAGE + (ROOT / "infra/kubernetes/README.md").read_text()):
        assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.+)$", PAGE)}, anchor


def test_parameters_outputs_and_services_are_those_of_the_deployment():
    main, parameters_of_azd = (ROOT / "infra/main.bicep").read_text(), (ROOT / "infra/main.parameters.json").read_text()
    azure = blocks("azure")
    [function] = re.findall(r"(?ms)^deploy\(\) \{.+?^\}", azure)
    given = function[function.index("--parameters") :] + "".join(re.findall(r"(?m)^deploy create .+$", azure))
    names = set(re.findall(r" (\w+)=", given))
    assert {"location", "image", "authClientId"} <= names
    for name in names | set(re.findall(r"`(\w+)=(?:true|false)`", PAGE)):
        assert re.search(rf"(?m)^param {name}\b", main), name
    required = set(re.findall(r"(?m)^param (\w+) [\w\[\]]+$", main))
    assert required <= names
    for name in re.findall(r"\(output (A[A-Z_]+)\)", azure):
        assert re.search(rf"(?m)^output {name}\b", main), name
    project = yaml.safe_load((ROOT / "azure.yaml").read_text())
    for setting in {*re.findall(r"azd env set (\w+)", azure + (ROOT / "azure.yaml").read_text()), "AOAI_IMAGE"}:
        assert f"${{{setting}" in parameters_of_azd, setting
    for name, service in project["services"].items():
        assert (ROOT / service["project"]).is_dir() and f"'azd-service-name': '{name}'" in (ROOT / f"infra/modules/{name}.bicep").read_text()


def test_the_image_is_built_once_and_azd_is_told_its_name(tmp_path):
    """infra/build-image.sh with an `az` and an `azd` that write down what they were asked."""
    calls = tmp_path / "calls"
    (tmp_path / "az").write_text(
        f"""#!/bin/sh
echo "az $*" >> {calls}
case "$1 $2" in
"acr show") echo contoso.azurecr.io ;;
"acr repository") test -e {tmp_path}/built && echo found || exit 3 ;;
"acr build") touch {tmp_path}/built; echo building ;;
esac
"""
    )
    (tmp_path / "azd").write_text(f'#!/bin/sh\necho "azd $*" >> {calls}\n')
    # a clean commit, whatever state the working folder is in
    (tmp_path / "git").write_text("#!/bin/sh\necho 0123456789ab\n")
    for tool in ("az", "azd", "git"):
        (tmp_path / tool).chmod(0o755)
    hook = yaml.safe_load((ROOT / "azure.yaml").read_text())["hooks"]["postprovision"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    image = "contoso.azurecr.io/aoai-usage-pipeline:0123456789ab"

    def build(*arguments: str, **more: str) -> str:
        done = subprocess.run([ROOT / hook["run"], *arguments], cwd=tmp_path, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert build("contoso") == f"{image}\n"
    assert "az acr build --registry contoso --image aoai-usage-pipeline:0123456789ab ." in calls.read_text()
    calls.unlink()
    azd = {"AZURE_ENV_NAME": "test", "AZURE_CONTAINER_REGISTRY_NAME": "contoso"}
    assert build(**azd) == f"{image}\n"
    assert "acr build" not in calls.read_text() and f"azd env set AOAI_IMAGE {image}" in calls.read_text()
    calls.unlink()
    build(**azd, AOAI_IMAGE=image)
    assert "azd" not in calls.read_text()
    nameless = subprocess.run([ROOT / hook["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert nameless.returncode != 0 and "name the registry" in nameless.stderr
