"""The deployment in infra/: checked as far as no Azure allows, by a checker that is shown to find each kind of fault."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from azure.cosmos import CosmosClient

from aoai_usage_pipeline.publish import documents
from aoai_usage_pipeline.publish.cosmos import Cosmos
from aoai_usage_pipeline.settings import Settings
from aoai_usage_pipeline.storage import open_store
from aoai_usage_pipeline_tests.bicep import Project
from aoai_usage_pipeline_tests.bicep_plan import Resource, outputs, plan
from aoai_usage_pipeline_tests.bicep_types import OWN_TYPES, TypeData, json_type, own_type, unfit
from aoai_usage_pipeline_tests.conftest import ROOT
from aoai_usage_pipeline_tests.cosmos_server import KEY, CosmosServer

INFRA = ROOT / "infra"

SHELF = own_type(
    "Test/shelves@2024-01-01",
    {
        "name!": "string",
        "location!": "string",
        "tags": {"*": "string"},
        "sku": {"name!": "Basic | Large"},
        "properties": {"color": "red | green", "rows": "int", "open": "bool", "labels": ["string"], "url=": "string", "owner": {"mail!": "string"}},
    },
)
BOOK = own_type("Test/shelves/books@2024-01-01", {"name!": "string", "properties": {"pages": "int"}})
TYPES = {"Test/shelves": SHELF, "Test/shelves/books": BOOK}

PART = """
@description('What it is called.')
@minLength(3)
param name string
@description('How big.')
@allowed(['small', 'large'])
param size string = 'small'
@description('How many.')
param count int = 1
@description('Not to be told.')
@secure()
param code string = ''
@export()
var colors = { first: 'red' }
var hidden = size
resource shelf 'Test/shelves@2024-01-01' = {
  name: name
  location: 'x'
  sku: { name: 'Basic' }
  tags: { code: code }
}
output id string = '${shelf.id}${count}${hidden}'
"""

GOOD = """
import { colors } from 'part.bicep'
@description('Names begin with it.')
param prefix string = 'test'
@description('Tags.')
param tags object = {}
@description('Whether there are books.')
param books bool = true
@description('Mail addresses.')
param mails string[] = []
var open = { rows: 3, open: books }
var names = [{ name: 'a', pages: 1 }, { name: 'b', pages: 2 }]
resource shelf 'Test/shelves@2024-01-01' = {
  name: '${prefix}-shelf'
  location: resourceGroup().location
  tags: union(tags, { more: 'yes' })
  sku: { name: books ? 'Large' : 'Basic' }
  properties: union({ color: colors.first, labels: map(mails, mail => toLower(mail)) }, open, books ? { owner: { mail: 'x' } } : {})
  resource inner 'books' = {
    name: 'inner'
    properties: { ...open2 }
  }
}
var open2 = { pages: 3 }
@batchSize(1)
resource book 'Test/shelves/books@2024-01-01' = [
  for (item, i) in names: if (books) {
    parent: shelf
    name: '${item.name}${i}'
    properties: { pages: item.pages }
    dependsOn: [shelf::inner]
  }
]
resource other 'Test/shelves@2023-01-01' existing = { name: 'other' }
module part 'part.bicep' = { params: { name: 'part', size: books ? 'small' : 'large' } }
output url string = shelf.properties.url
output ids array = [for i in range(0, 2): book[i].id]
output part string = '${part.outputs.id}${other.name}'
"""


def check(folder: Path, **files: str) -> list[str]:
    """The faults of files, named without their endings."""
    for name, content in ({"part": PART} | files).items():
        (folder / f"{name}.bicep").write_text(content)
    return [str(fault) for fault in Project(folder, lambda name: TYPES.get(name, f"{name} is unknown")).faults()]


def test_the_checker_lets_right_files_pass(tmp_path):
    assert check(tmp_path, main=GOOD) == []


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("var open2 = {", "var open2 = = {", "syntax"),
        ("color: colors.first", "colour: colors.first", "BCP037: properties has no property colour"),
        ("labels: map", "Labels: map", "BCP037: properties has no property Labels; it is labels"),
        ("color: colors.first", "color: 'blue'", "BCP036: color is 'blue', expected one of 'red', 'green'"),
        ("'Large' : 'Basic'", "'Large' : 'Base'", "BCP036: name is 'Base', expected one of 'Basic', 'Large'"),
        ("rows: 3", "rows: 'three'", "BCP036: rows is of type string, expected int"),
        ("open: books", "open: prefix", "BCP036: open is of type string, expected bool"),
        ("toLower(mail)", "length(mail)", "is of type int, expected string"),
        ("pages: 2", "pages: 'two'", None),
        ("{ pages: item.pages }", "{ pages: item.name }", "BCP036: pages is of type string, expected int"),
        ("{ pages: item.pages }", "{ pages: item.page }", "BCP053: item has no page"),
        ("{ pages: item.pages }", "{ pages: '1' }", "BCP036: pages is of type string, expected int"),
        ("{ mail: 'x' }", "{ }", "BCP035: owner lacks mail"),
        ("location: resourceGroup().location", "", "BCP035: Test/shelves lacks location"),
        ("location: resourceGroup().location", "location: 'x'\n  id: 'y'", "BCP073: property id is read-only"),
        ("location: resourceGroup().location", "location: 'x'\n  location: 'y'", "BCP025: location is there twice"),
        ("name: 'inner'", "name: 'shelf/inner'", "BCP169: the name of Test/shelves/books must have 0 slashes"),
        ("parent: shelf\n", "", "BCP169: the name of Test/shelves/books must have 1 slashes"),
        ("parent: shelf\n", "parent: part\n", "BCP036: the parent of Test/shelves/books cannot be module"),
        ("Test/shelves@2023-01-01", "Test/shelfs@2023-01-01", "BCP081: Test/shelfs is unknown"),
        ("Test/shelves@2023-01-01", "Test/shelves@latest", "BCP029: Test/shelves has no valid API version"),
        ("Test/shelves@2023-01-01", "Test/shelves@2025-01-01", "BCP081: Test/shelves@2025-01-01 is newer than the newest known, 2024-01-01"),
        ("resource inner 'books'", "resource inner 'pages'", "BCP081: Test/shelves/pages is unknown"),
        ("shelf.properties.url", "shelf.properties.uri", "BCP053: shelf.properties has no uri"),
        ("output url string", "output url int", "BCP036: output url is of type string, expected int"),
        ("'part.bicep' = {", "'parts.bicep' = {", "BCP091: no file 'parts.bicep'"),
        ("name: 'part', size", "size", "BCP035: module part lacks name"),
        ("name: 'part'", "name: 'p'", "BCP329: name is 'p', which breaks minLength 3"),
        ("name: 'part'", "name: 'part', height: 3", "BCP037: module part has no property height"),
        ("'small' : 'large'", "'small' : 'huge'", "BCP036: size is 'huge', expected one of 'small', 'large'"),
        ("name: 'part'", "name: 'part', count: books", "BCP036: count is of type bool, expected int"),
        ("params: { name", "param: { name", "BCP037: a module has no param"),
        ("part.outputs.id", "part.outputs.ids", "BCP053: part.outputs has no ids"),
        ("'part.bicep' = {", "'part.bicep' = { scope: subscription()\n", "BCP134: part has the scope subscription, its file resourceGroup"),
        ("import { colors }", "targetScope = 'subscription'\nimport { colors }", "BCP134: part has the scope subscription, its file resourceGroup"),
        ("import { colors }", "import { hidden }", "BCP360: part.bicep does not export hidden"),
        ("import { colors }", "import { nothing }", "BCP360: part.bicep does not export nothing"),
        ("from 'part.bicep'", "from 'party.bicep'", "BCP091: no file party.bicep"),
        ("colors.first", "colors.last", "BCP053: colors has no last"),
        ("colors.first", "'red'", "no-unused-imports: colors is never used"),
        ("open: books }", "open: true }\nvar more = 1", "no-unused-vars: more is never used"),
        ("@description('Tags.')", "@description('X.')\nparam more string\n@description('Tags.')", "no-unused-params: more is never used"),
        ("@description('Tags.')", "", "parameter tags has no @description"),
        ("@description('Tags.')", "@descripton('Tags.')", "BCP057: there is no decorator descripton"),
        ("prefix string = 'test'", "prefix int = 'test'", "BCP036: the default of prefix is of type string, expected int"),
        ("param mails string[]", "param mails strings[]", "BCP302: strings is not a type"),
        ("'${prefix}-shelf'", "'${prefixes}-shelf'", "BCP057: prefixes is not declared"),
        ("mail => toLower(mail)", "mail => toLower(mails2)", "BCP057: mails2 is not declared"),
        ("toLower(mail)", "toLower(mail, 1)", "BCP071: toLower takes 1 arguments"),
        ("toLower(mail)", "lower(mail)", "BCP057: there is no function lower"),
        ("resourceGroup().location", "loadTextContent('no.txt')", "BCP091: loadTextContent: no file no.txt"),
        ("param prefix string = 'test'", "@secure()\nparam prefix string = 'test'", "secure-parameter-default: the secret prefix has a default"),
        (
            "param prefix string = 'test'",
            "param adminPassword string\nvar prefix = adminPassword",
            "secure-secrets-in-params: adminPassword is not @secure",
        ),
        ("shelf.properties.url", "listKeys(shelf.id, '2024-01-01').key", "outputs-should-not-contain-secrets: url"),
        ("param prefix string = 'test'", "@secure()\nparam key string\nvar prefix = key", "a secret is passed to name, which is not @secure"),
        ("range(0, 2)", "range(0, length(part.outputs.id))", "BCP178: the list of the loop is known only when part is deployed"),
        ("if (books) {", "if (late) {", "BCP177: the condition is known only when part is deployed"),
        ("'${prefix}-shelf'", "late ? 'a' : 'b'", "BCP120: name is known only when part is deployed"),
        ("{ pages: item.pages }", "{ pages: [for n in [1]: { x: [for m in [2]: m] }] }", "BCP142: a loop cannot stand in the loop of another"),
        ("'${prefix}-shelf'", "newGuid()", "BCP065: newGuid is for defaults of parameters only"),
        ("output ids array = [", "output ids array = books ? [] : [", "BCP138: a loop cannot stand here"),
        ("var names = [", "var a1 = b1\nvar b1 = a1\nvar names = [", "BCP080: a1 needs b1 needs a1"),
        ("param tags object = {}", "param tags object = {}\nvar tags = {}", "BCP028: tags is declared twice"),
    ],
)
def test_the_checker_finds(tmp_path, right, wrong, fault):
    source = GOOD.replace("name: 'part'", "name: prefix") if "which is not @secure" in str(fault) else GOOD
    source += "var late = part.outputs.id == 'x'\n"
    assert right in source
    found = check(tmp_path, main=source.replace(right, wrong, 1))
    assert [f for f in found if (fault or "BCP") in f] or fault is None, found


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"prefix": "${AZURE_ENV_NAME}", "books": "${BOOKS=true}", "mails": ["a"]}, None),
        ({}, "main.parameters.json:1:1: BCP035: the file lacks needed"),
        ({"prefix": "x", "boks": True}, "main.parameters.json:3:26: BCP037: the file has no property boks"),
        ({"books": "yes"}, "main.parameters.json:2:2: BCP036: books is of type string, expected bool"),
        ({"mails": [1]}, "BCP036: an item of mails is of type int, expected string"),
        ({"prefix": "much too long"}, "BCP329: prefix is 'much too long', which breaks maxLength 9"),
    ],
)
def test_parameter_files_fit_their_parameters(tmp_path, parameters, fault):
    given = parameters | ({} if not parameters else {"needed": 1})
    text = json.dumps({"parameters": {name: {"value": value} for name, value in given.items()}}, indent=1)
    (tmp_path / "main.parameters.json").write_text(text)
    needed = "@description('.')\nparam needed int\nvar more = needed\noutput needed int = more\n@maxLength(9)\n@description('Names"
    found = check(tmp_path, main=GOOD.replace("@description('Names", needed))
    assert (
        found == []
        if fault is None
        else any(fault.rpartition("json:")[2].split(": ", 1)[-1] in f and f.startswith("main.parameters.json:") for f in found)
    ), found


def test_a_fault_can_be_silenced_by_its_code_alone(tmp_path):
    wrong = GOOD.replace("  sku: {", "  #disable-next-line BCP036\n  sku: {").replace("'Large' : 'Basic'", "'Base' : 'Basic'")
    assert check(tmp_path, main=wrong) == []
    assert check(tmp_path, main=wrong.replace("BCP036", "BCP037"))


PLANNED = """
import { colors } from 'part.bicep'
@description('.')
param books bool = true
@description('.')
param mails array = ['b', 'A']
var none = books ? null : part.?outputs.id
var sizes = { small: 1, large: 2 }
resource old 'Test/shelves@2024-01-01' existing = { name: 'old' }
resource shelf 'Test/shelves@2024-01-01' = [
  for (mail, i) in mails: if (i < 1 || books) {
    name: '${toLower(mail)}${i + 1 * 2}'
    location: ' ${resourceGroup().location} \\${x} '
    properties: union({ a: { b: 1 } }, i == 0 ? { a: { c: 2 } } : {}, { ...sizes })
    resource inner 'books' = { name: 'x' }
  }
]
module part 'part.bicep' = if (books) { params: { name: 'part${length(mails)}', code: colors.first } }
output ids array = [
  for (mail, i) in mails: '${shelf[i].id} ${shelf[i].properties.url} ${books ? part!.outputs.id : old.name}'
]
output more array = map(filter(items(sizes), size => size.value > 1 && true), size => !empty(size.key) ? size.key : none)
"""


def test_the_plan_has_what_parameters_lead_to(tmp_path):
    (tmp_path / "part.bicep").write_text(PART)
    (tmp_path / "main.bicep").write_text(PLANNED)
    made = {r.name: r for r in plan(tmp_path / "main.bicep")}
    assert {name: r.type for name, r in made.items() if "/" in name} == dict.fromkeys(["b2/x", "a3/x"], "Test/shelves/books")
    assert made.keys() == {"b2", "b2/x", "a3", "a3/x", "part2"}
    assert made["b2"].body["properties"] == {"a": {"b": 1, "c": 2}, "small": 1, "large": 2}
    assert made["a3"].body == {"name": "a3", "location": " «resourceGroup()».location ${x} ", "properties": {"a": {"b": 1}, "small": 1, "large": 2}}
    assert made["part2"].body["tags"] == {"code": "red"}
    assert outputs(tmp_path / "main.bicep") == {
        "ids": [f"«Test/shelves/{name}».id «Test/shelves/{name}».properties.url «Test/shelves/part2».id1small" for name in ("b2", "a3")],
        "more": ["large"],
    }


def test_the_plan_finds_what_is_used_and_not_made(tmp_path):
    (tmp_path / "part.bicep").write_text(PART)
    (tmp_path / "main.bicep").write_text(PLANNED.replace("books ? part!.outputs.id : old.name", "part!.outputs.id"))
    with pytest.raises(LookupError, match=r"main\.bicep:20: there is no part!\.outputs"):
        plan(tmp_path / "main.bicep", books=False, mails=["b"])


# --- the files of infra/ ---------------------------------------------------------------------------------------------------------

# the file, the compiler's code, and why it is silenced there
SILENCED = {
    ("api-management.bicep", "BCP036"): "the tier PremiumV2 is newer than the type data",
    ("api-management-api.bicep", "BCP035"): "a pool of backends has no address and protocol of its own, which the type data ask for",
    ("api-management-api.bicep", "BCP037"): "largeLanguageModel is newer than the type data",
    ("api-management-api.bicep", "BCP081"): "so is the API version that it came with",
}


@pytest.fixture(scope="module")
def types() -> Iterator[TypeData]:
    folder, node = ROOT / ".azmcp", ROOT / ".venv/bin/node"
    if not (folder / "node_modules").is_dir():
        pytest.fail("Microsoft's type data are not installed: run `make test`, which installs them")
    with TypeData(folder, str(node) if node.exists() else "node") as data:
        yield data


def test_the_files_fit_each_other():
    assert list(map(str, Project(INFRA).faults())) == []


@pytest.mark.slow
def test_the_files_fit_microsofts_types(types):
    assert list(map(str, Project(INFRA, types).faults())) == []


STORAGE = """
resource account 'Microsoft.Storage/storageAccounts@2025-01-01' = {
  name: 'account'
  location: 'westeurope'
  kind: 'StorageV2'
  sku: { name: 'Standard_ZRS' }
  properties: { allowBlobPublicAccess: false, minimumTlsVersion: 'TLS1_2' }
}
"""
COSMOS = """
resource account 'Microsoft.DocumentDB/databaseAccounts@2025-04-15' = {
  name: 'account'
  location: 'westeurope'
  properties: {
    databaseAccountOfferType: 'Standard'
    locations: [{ locationName: 'westeurope', failoverPriority: 0 }]
    backupPolicy: { type: 'Continuous', continuousModeProperties: { tier: 'Continuous7Days' } }
  }
}
"""
HUB = """
resource rule 'Microsoft.EventHub/namespaces/authorizationRules@2024-01-01' = {
  name: 'namespace/rule'
  properties: { rights: ['Listen'] }
}
output send string = rule.name
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "right", "wrong", "fault"),
    [
        (STORAGE, "allowBlobPublicAccess", "allowBlobPublicAcess", "BCP037: properties has no property allowBlobPublicAcess"),
        (STORAGE, "TLS1_2", "TLS2", "BCP036: minimumTlsVersion is 'TLS2'"),
        (STORAGE, "sku: { name: 'Standard_ZRS' }", "", "BCP035: Microsoft.Storage/storageAccounts lacks sku"),
        (STORAGE, "name: 'account'", "name: 'an-account'", "BCP329: name is 'an-account', which breaks pattern"),
        (STORAGE, "allowBlobPublicAccess: false", "primaryLocation: 'x'", "BCP073: property primaryLocation is read-only"),
        (STORAGE, "allowBlobPublicAccess: false", "allowBlobPublicAccess: 'no'", "BCP036: allowBlobPublicAccess is of type string, expected bool"),
        (STORAGE, "2025-01-01", "2045-01-01", "BCP081: Microsoft.Storage/storageAccounts@2045-01-01 is newer"),
        (STORAGE, "storageAccounts@", "storageAcounts@", "BCP081: Microsoft.Storage/storageAcounts is not in the type data"),
        (COSMOS, "type: 'Continuous'", "type: 'Continous'", "BCP036: type is 'Continous', expected one of 'Continuous', 'Periodic'"),
        (COSMOS, "continuousModeProperties", "periodicModeProperties", "BCP037: backupPolicy has no property periodicModeProperties"),
        (COSMOS, "failoverPriority: 0", "failoverPriority: -1", "BCP329: failoverPriority is -1, which breaks minValue 0"),
        (HUB, "['Listen']", "['Listens']", "BCP036: an item of rights is 'Listens'"),
        (HUB, "rule.name", "rule.properties.keys", "BCP053: rule.properties has no keys"),
    ],
)
def test_the_checker_finds_with_microsofts_types(tmp_path, types, source, right, wrong, fault):
    main = tmp_path / "main.bicep"
    main.write_text(source)
    assert Project(tmp_path, types).faults() == []
    main.write_text(source.replace(right, wrong))
    assert any(fault in str(found) for found in Project(tmp_path, types).faults()), Project(tmp_path, types).faults()


def test_faults_are_silenced_only_for_a_reason():
    found = {
        (path.name, code)
        for path in INFRA.rglob("*.bicep")
        for line in re.findall(r"#disable-next-line (.+)", path.read_text())
        for code in line.split()
    }
    assert found == SILENCED.keys()


@pytest.mark.slow
def test_types_are_written_by_hand_only_where_microsofts_data_lack_them(types):
    assert [name for name in OWN_TYPES if not isinstance(types.microsofts(name), str)] == []


# --- what a deployment makes -----------------------------------------------------------------------------------------------------

NEEDED = {"location": "westeurope", "publisherEmail": "platform@example.com", "image": "registry.example/pipeline:1.2.3"}
PRIVATE = {"privateEndpoints": True, "registryPublicAccess": False, "apiManagementSku": "StandardV2", "apiManagementPublicAccess": False}
EVERYTHING = PRIVATE | {
    "applicationGateway": True,
    "gatewayHostName": "ai.example.com",
    "gatewayCertificateSecretId": "https://vault.example/secrets/certificate",
    "authClientId": "11111111-2222-3333-4444-555555555555",
    "allowedGroups": ["99999999-8888-7777-6666-555555555555"],
    "functionAppCodeDeployed": True,
    "teamsWebhookUrl": "https://teams.example",
    "notificationMailTo": "finops@example.com",
    "alertEmails": ["oncall@example.com"],
    "operatorPrincipalId": "OPERATOR",
    "lakeReaderPrincipalIds": ["READER"],
    "cosmosReaderPrincipalIds": ["READER"],
    "callers": [{"name": "shop", "displayName": "Shop"}],
    "cosmosUsage": True,
    "tags": {"team": "platform"},
}
SUBNETS = ("applicationGateway", "apiManagement", "containerApps", "functions", "privateEndpoints", "postgresql")


def deployment(**parameters: object) -> list[Resource]:
    return plan(INFRA / "main.bicep", **NEEDED | parameters)


@pytest.fixture(scope="module")
def smallest() -> list[Resource]:
    return deployment()


@pytest.fixture(scope="module")
def everything() -> list[Resource]:
    return deployment(**EVERYTHING)


def of_type(resources: list[Resource], name: str) -> list[Resource]:
    return [r for r in resources if r.type.lower() == name.lower()]


def one(resources: list[Resource], type_name: str, last: str) -> Resource:
    (found,) = [r for r in of_type(resources, type_name) if r.name.rpartition("/")[2] == last]
    return found


def properties(resource: Resource) -> dict[str, Any]:
    return resource.body["properties"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters", [{}, EVERYTHING, EVERYTHING | {"namePrefix": "a" * 22}, {"namePrefix": "abc", "capture": False, "azureMonitorSends": False}]
)
def test_what_is_deployed_fits_microsofts_types(types, parameters):
    """With the values that parameters have here, names with their lengths included."""
    faults = []
    for resource in deployment(**parameters):
        own = {key: value for key, value in resource.body.items() if key != "dependsOn"}
        faults += [f"{resource}: {why}" for why in unfit(json_type(own, lambda text: "«" in text), types(resource.type).body)]
    silenced = [fault for fault in faults if any(code in fault and words in fault for code, words in KNOWN)]
    assert [fault for fault in faults if fault not in silenced] == []


# what the files silence
KNOWN = [("BCP035", "service/backends"), ("BCP037", "largeLanguageModel")]


@pytest.mark.slow
def test_every_resource_has_the_tags(types, everything):
    taggable = [
        r for r in everything if "tags" in types(r.type).body.shape().properties and not types(r.type).body.shape().properties["tags"].read_only
    ]
    untagged = [str(r) for r in taggable if (r.body.get("tags") or {}).get("team") != "platform"]
    assert [name for name in untagged if not any(type_name in name for type_name in UNTAGGED)] == []
    assert len(taggable) > 20


# children that Azure lets have tags of their own, which nobody looks for
UNTAGGED = ("Microsoft.CognitiveServices/accounts/deployments", "Microsoft.DocumentDB/databaseAccounts/")

# each changed alone, and some together
OTHERWISE = [
    *({key: value} for key, value in EVERYTHING.items() if key != "registryPublicAccess"),
    {"image": ""},
    {"functionApp": False},
    {"capture": False},
    {"azureMonitorSends": False},
    {"existingApiManagementName": "gateway"},
    {"existingOpenAiAccountIds": ["/subscriptions/s/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a"]},
    EVERYTHING | {"functionApp": False, "existingApiManagementName": "gateway", "image": ""},
    EVERYTHING
    | {
        "existingVirtualNetworkId": "/v",
        "existingSubnetIds": dict.fromkeys(SUBNETS, "/s"),
        "privateDnsZonesResourceGroupId": "/subscriptions/s/resourceGroups/dns",
    },
]


@pytest.mark.parametrize("parameters", OTHERWISE, ids=lambda p: ",".join(p)[:40])
def test_other_parameters_lead_to_a_deployment_too(parameters):
    """Nothing that is left out is used, and no two resources are the same."""
    made = [(r.type.lower(), r.name.lower(), str(r.scope)) for r in deployment(**parameters)]
    assert len(made) == len(set(made))


ROLES = {
    "7f951dda-4ed3-4680-a7ca-43fe172d538d": "AcrPull",
    "5e0bd9bd-7b93-4f28-af87-19fc36ad61bd": "Cognitive Services OpenAI User",
    "09976791-48a7-449e-bb21-39d1a415f350": "Communication and Email Service Owner",
    "00000000-0000-0000-0000-000000000001": "Cosmos DB Built-in Data Reader",
    "00000000-0000-0000-0000-000000000002": "Cosmos DB Built-in Data Contributor",
    "a638d3c7-ab3a-418d-83e6-5f17a39d4fde": "Azure Event Hubs Data Receiver",
    "2b629674-e913-4c01-ae53-ef4638d8f975": "Azure Event Hubs Data Sender",
    "4633458b-17de-408a-b874-0445c86b69e6": "Key Vault Secrets User",
    "3913510d-42f4-4e42-8a64-420c390055eb": "Monitoring Metrics Publisher",
    "ba92f5b4-2d11-453d-a403-e96b0029c9fe": "Storage Blob Data Contributor",
    "b7e6dc6d-f1e8-4753-8033-0f276bb0955b": "Storage Blob Data Owner",
    "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1": "Storage Blob Data Reader",
}

# who, on what, as what: one line for each connection that code or service makes
CONNECTIONS = {
    # storage/blob.py, hub/client.py, publish/cosmos.py, the telemetry's exporter, and the Container Apps for it
    ("pipeline", "containers/capture", "Storage Blob Data Reader"),
    ("pipeline", "containers/lake", "Storage Blob Data Contributor"),
    ("pipeline", "containers/reference", "Storage Blob Data Reader"),
    ("pipeline", "eventhubs/usage", "Azure Event Hubs Data Receiver"),
    ("pipeline", "eventhubs/notifications", "Azure Event Hubs Data Sender"),
    ("pipeline", "dbs/aoai-usage", "Cosmos DB Built-in Data Contributor"),
    ("pipeline", "components/aoai-usage-insights", "Monitoring Metrics Publisher"),
    ("pipeline", "vaults/aoaiusage-*", "Key Vault Secrets User"),
    ("pipeline", "registries/aoaiusage*", "AcrPull"),
    # API Management: its backend, its loggers
    ("gateway", "accounts/aoai-usage-*-openai", "Cognitive Services OpenAI User"),
    ("gateway", "eventhubs/usage", "Azure Event Hubs Data Sender"),
    ("gateway", "components/aoai-usage-insights", "Monitoring Metrics Publisher"),
    # Event Hubs Capture
    ("capture", "containers/capture", "Storage Blob Data Contributor"),
    # the certificate of the application gateway
    ("firewall", "vaults/aoaiusage-*", "Key Vault Secrets User"),
    # infra/functions
    ("functions", "storageAccounts/aoaiusagefn*", "Storage Blob Data Owner"),
    ("functions", "secrets/notification-receiver-key", "Key Vault Secrets User"),
    ("functions", "secrets/teams-webhook-url", "Key Vault Secrets User"),
    ("functions", "components/aoai-usage-insights", "Monitoring Metrics Publisher"),
    ("functions", "communicationServices/aoai-usage-functions-*-communication", "Communication and Email Service Owner"),
    # people
    ("OPERATOR", "containers/capture", "Storage Blob Data Reader"),
    ("OPERATOR", "containers/lake", "Storage Blob Data Reader"),
    ("OPERATOR", "containers/reference", "Storage Blob Data Contributor"),
    ("OPERATOR", "eventhubs/usage", "Azure Event Hubs Data Sender"),
    ("READER", "containers/lake", "Storage Blob Data Reader"),
    ("READER", "containers/reference", "Storage Blob Data Reader"),
    ("READER", "dbs/aoai-usage", "Cosmos DB Built-in Data Reader"),
}
IDENTITIES = {
    "userAssignedIdentities/aoai-usage-pipeline»": "pipeline",
    "Microsoft.ApiManagement/service/": "gateway",
    "Microsoft.EventHub/namespaces/": "capture",
    "userAssignedIdentities/aoai-usage-gateway»": "firewall",
    "userAssignedIdentities/aoai-usage-functions-": "functions",
}


def connections(resources: list[Resource]) -> set[tuple[str, str, str]]:
    found = set()
    for resource in of_type(resources, "Microsoft.Authorization/roleAssignments") + of_type(
        resources, "Microsoft.DocumentDB/databaseAccounts/sqlRoleAssignments"
    ):
        given = properties(resource)
        who = next((name for words, name in IDENTITIES.items() if words in given["principalId"]), given["principalId"])
        assert who not in IDENTITIES.values() or given["principalId"].endswith(".principalId"), f"{resource}: {given['principalId']}"
        on = "/".join(
            (resource.scope.type.rpartition("/")[2], resource.scope.name.rpartition("/")[2]) if resource.scope else given["scope"].split("/")[-2:]
        )
        found.add((who, on.replace("abcdefghijklm", "*"), ROLES[given["roleDefinitionId"].rpartition("/")[2]]))
    return found


def test_each_identity_has_the_roles_of_its_connections_and_no_others(everything):
    assert connections(everything) == CONNECTIONS
    (administrator,) = of_type(everything, "Microsoft.DBforPostgreSQL/flexibleServers/administrators")
    assert "aoai-usage-pipeline" in administrator.name and properties(administrator)["principalName"] == "aoai-usage-pipeline"


def test_a_drain_may_write_capture_files():
    found = connections(deployment(capture=False))
    assert ("pipeline", "containers/capture", "Storage Blob Data Contributor") in found
    assert not properties(one(deployment(capture=False), "Microsoft.EventHub/namespaces/eventhubs", "usage")).get("captureDescription")


# the switch of each type that can be used without keys and passwords
LOCAL_AUTH = {
    "Microsoft.App/containerApps": None,
    "Microsoft.CognitiveServices/accounts": ("disableLocalAuth", True),
    "Microsoft.ContainerRegistry/registries": ("adminUserEnabled", False),
    "Microsoft.DBforPostgreSQL/flexibleServers": ("authConfig", {"activeDirectoryAuth": "Enabled", "passwordAuth": "Disabled"}),
    "Microsoft.DocumentDB/databaseAccounts": ("disableLocalAuth", True),
    "Microsoft.EventHub/namespaces": ("disableLocalAuth", True),
    "Microsoft.Insights/components": ("DisableLocalAuth", True),
    "Microsoft.KeyVault/vaults": ("enableRbacAuthorization", True),
    "Microsoft.OperationalInsights/workspaces": ("features", {"disableLocalAuth": True}),
    "Microsoft.Storage/storageAccounts": ("allowSharedKeyAccess", False),
    "Microsoft.Web/sites/basicPublishingCredentialsPolicies": ("allow", False),
}


def test_local_authentication_is_off():
    # Azure Monitor streams logs to the hub with a key, the only one; without its logs there is none
    resources = deployment(**EVERYTHING, azureMonitorSends=False)
    for name, switch in LOCAL_AUTH.items():
        assert of_type(resources, name), name
        for resource in of_type(resources, name) if switch else ():
            given = properties(resource)[switch[0]]
            assert (given | switch[1] if isinstance(given, dict) else switch[1]) == given, str(resource)
    assert not of_type(resources, "Microsoft.EventHub/namespaces/authorizationRules")


def test_nothing_is_public_with_private_endpoints(everything):
    for resource in everything:
        given = resource.body.get("properties") or {}
        closed = given.get("publicNetworkAccess", "Disabled") == "Disabled" or given["networkAcls"]["defaultAction"] == "Deny"
        assert closed or "aoaiusagefn" in resource.name, str(resource)  # the Function App's own storage has no private endpoint
    linked = {
        properties(r)["privateLinkServiceConnections"][0]["properties"]["groupIds"][0]
        for r in of_type(everything, "Microsoft.Network/privateEndpoints")
    }
    assert linked == {"blob", "vault", "Sql", "namespace", "Gateway", "registry", "account"}
    zones = {r.name for r in of_type(everything, "Microsoft.Network/privateDnsZones")}
    assert zones == {f"privatelink.{name}" for name in ZONES} and len(
        of_type(everything, "Microsoft.Network/privateDnsZones/virtualNetworkLinks")
    ) == len(zones)


# from Azure's table of private DNS zones
ZONES = (
    "azure-api.net",
    "azurecr.io",
    "blob.«az.environment()».suffixes.storage",
    "documents.azure.com",
    "openai.azure.com",
    "postgres.database.azure.com",
    "servicebus.windows.net",
    "vaultcore.azure.net",
)


def test_the_web_interface_is_open_to_nobody_without_a_sign_in(everything, smallest):
    web = one(everything, "Microsoft.App/containerApps", "aoai-usage-webserver")
    assert (
        properties(web)["configuration"]["ingress"] | {"external": True, "allowInsecure": False, "targetPort": 3000}
        == properties(web)["configuration"]["ingress"]
    )
    (sign_in,) = of_type(everything, "Microsoft.App/containerApps/authConfigs")
    assert sign_in.name.startswith(web.name) and properties(sign_in)["platform"] == {"enabled": True}
    assert properties(sign_in)["globalValidation"] == {
        "unauthenticatedClientAction": "RedirectToLoginPage",
        "redirectToProvider": "azureactivedirectory",
    }
    validation = properties(sign_in)["identityProviders"]["azureActiveDirectory"]["validation"]
    policy = validation["defaultAuthorizationPolicy"]
    assert EVERYTHING["authClientId"] in validation["allowedAudiences"] and policy["allowedPrincipals"]["groups"] == EVERYTHING["allowedGroups"]
    assert len(policy["allowedApplications"]) == 2 and all(policy["allowedApplications"])
    for resources in (everything, smallest):
        for app in of_type(resources, "Microsoft.App/containerApps"):
            scale, ingress = properties(app)["template"]["scale"], properties(app)["configuration"].get("ingress")
            # a second daemon would do every tick twice, a second code location would not know of the first one's runs
            assert scale == {"minReplicas": 1, "maxReplicas": 1}, str(app)
            assert not ingress or not ingress["external"] or (resources is everything and app is web), str(app)
    assert not of_type(smallest, "Microsoft.App/containerApps/authConfigs")


# Azure's supported log categories, of the types that are asked for some
CATEGORIES = {
    "Microsoft.ApiManagement/service": {"GatewayLogs", "GatewayLlmLogs", "WebSocketConnectionLogs", "DeveloperPortalAuditLogs"},
    "Microsoft.CognitiveServices/accounts": {"Audit", "RequestResponse", "AzureOpenAIRequestUsage", "Trace"},
    "Microsoft.EventHub/namespaces": {"ArchiveLogs", "OperationalLogs", "AutoScaleLogs", "RuntimeAuditLogs", "ApplicationMetricsLogs"},
    "Microsoft.KeyVault/vaults": {"AuditEvent", "AzurePolicyEvaluationDetails"},
    "Microsoft.Network/applicationGateways": {"ApplicationGatewayAccessLog", "ApplicationGatewayPerformanceLog", "ApplicationGatewayFirewallLog"},
}


def test_logs_are_asked_for_by_names_that_azure_has(everything):
    asked = 0
    for setting in of_type(everything, "Microsoft.Insights/diagnosticSettings"):
        for log in properties(setting)["logs"]:
            assert setting.scope and log["enabled"]
            assert log.get("categoryGroup") in ("allLogs", "audit") or log["category"] in CATEGORIES[setting.scope.type], f"{setting}: {log}"
            asked += 1
    assert asked > 10


def test_the_loggers_sign_in_as_the_service(smallest):
    loggers = {r.name.rpartition("/")[2]: properties(r) for r in of_type(smallest, "Microsoft.ApiManagement/service/loggers")}
    assert {name: logger["loggerType"] for name, logger in loggers.items()} == {
        "aoai-usage": "azureEventHub",
        "aoai-usage-insights": "applicationInsights",
        "azuremonitor": "azureMonitor",
    }
    assert loggers["aoai-usage"]["credentials"].keys() == {"endpointAddress", "name", "identityClientId"}
    assert loggers["aoai-usage-insights"]["credentials"].keys() == {"connectionString", "identityClientId"}
    assert {logger["credentials"]["identityClientId"] for logger in loggers.values() if "credentials" in logger} == {"SystemAssigned"}


def test_event_grid_tells_the_function_about_capture_files_of_the_hub(everything):
    (topic,) = of_type(everything, "Microsoft.EventGrid/systemTopics")
    assert properties(topic)["topicType"] == "Microsoft.EventHub.Namespaces"
    (subscription,) = of_type(everything, "Microsoft.EventGrid/systemTopics/eventSubscriptions")
    given = properties(subscription)
    assert given["filter"] == {"includedEventTypes": ["Microsoft.EventHub.CaptureFileCreated"], "subjectBeginsWith": "eventhubs/usage"}
    function = given["destination"]["properties"]["resourceId"].rpartition("/")[2]
    assert f'@app.function_name("{function}")\n@app.event_grid_trigger' in (INFRA / "functions/function_app.py").read_text()


def test_capture_writes_what_the_pipeline_reads(smallest):
    capture = properties(one(smallest, "Microsoft.EventHub/namespaces/eventhubs", "usage"))["captureDescription"]
    destination = capture["destination"]["properties"]
    assert capture["enabled"] and capture["skipEmptyArchives"] and capture["encoding"] == "Avro"
    assert destination["archiveNameFormat"] == Settings().capture_name_format
    assert (
        destination["blobContainer"] == one(smallest, "Microsoft.Storage/storageAccounts/blobServices/containers", "capture").name.rpartition("/")[2]
    )
    settings = pipeline_settings(smallest)
    assert settings.capture_url.endswith(f"/{destination['blobContainer']}")
    assert settings.capture_minutes * 60 == capture["intervalInSeconds"]
    assert settings.event_hub_name == "usage"
    assert one(smallest, "Microsoft.EventHub/namespaces/eventhubs/consumergroups", settings.event_hub_consumer_group)


def test_the_containers_of_cosmos_db_are_those_that_the_code_makes(smallest, tmp_path):
    store = open_store(str(tmp_path), create=True)
    with CosmosServer() as server:
        cosmos = Cosmos(server.endpoint, Settings().cosmos_database, KEY)
        for container in (documents.DAILY_BILLING, documents.USAGE):
            list(cosmos.publish(container, store, []))
        list(cosmos.publish_statements(store, []))
        cosmos.close()
        with CosmosClient(server.endpoint, KEY) as client:
            database = client.get_database_client(Settings().cosmos_database)
            made = {c.name: database.get_container_client(c.name).read() for c in (documents.DAILY_BILLING, documents.USAGE, documents.STATEMENTS)}
    (database,) = of_type(smallest, "Microsoft.DocumentDB/databaseAccounts/sqlDatabases")
    deployed = {r.name.rpartition("/")[2]: properties(r)["resource"] for r in of_type(smallest, f"{database.type}/containers")}
    assert database.name.rpartition("/")[2] == Settings().cosmos_database
    assert {name: container_of(c) for name, c in deployed.items()} == {name: container_of(c) for name, c in made.items()}


def container_of(definition: dict[str, Any]) -> dict[str, Any]:
    policy = definition["indexingPolicy"]
    paths = {kind: sorted(path["path"] for path in policy[kind]) for kind in ("includedPaths", "excludedPaths")}
    key = definition["partitionKey"]
    return {"partitionKey": (key["kind"], key["paths"]), "ttl": definition.get("defaultTtl"), "mode": policy["indexingMode"], **paths}


def test_the_gateway_sends_its_logs_to_the_hub(smallest):
    to_hub = [r for r in of_type(smallest, "Microsoft.Insights/diagnosticSettings") if properties(r).get("eventHubName")]
    (setting,) = to_hub
    assert setting.scope and setting.scope.type == "Microsoft.ApiManagement/service"
    assert {log["category"] for log in properties(setting)["logs"] if log["enabled"]} >= {"GatewayLogs", "GatewayLlmLogs"}
    assert properties(setting)["eventHubName"] == "usage"
    rule = one(
        smallest,
        "Microsoft.EventHub/namespaces/authorizationRules",
        properties(setting)["eventHubAuthorizationRuleId"].partition("»")[0].rpartition("/")[2],
    )
    assert "Send" in properties(rule)["rights"]


# --- what the apps are told ------------------------------------------------------------------------------------------------------


class Asked(dict[str, str]):
    """An environment that notes what it is asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def environments(resources: list[Resource]) -> dict[str, dict[str, str]]:
    """The environment variables of each container, by the container's name; of a secret an address that any may have."""
    found = {}
    for app in of_type(resources, "Microsoft.App/containerApps"):
        secrets = {s["name"] for s in properties(app)["configuration"].get("secrets", [])}
        for container in properties(app)["template"]["containers"]:
            assert {e["secretRef"] for e in container["env"] if "secretRef" in e} <= secrets
            found[container["name"]] = {e["name"]: e.get("value", "https://secret.example") for e in container["env"]}
    return found


def pipeline_settings(resources: list[Resource]) -> Settings:
    """What the code location understands, with addresses in the place of those that only Azure knows."""
    known = {
        r"«[^»]+».properties.documentEndpoint": "https://x.documents.azure.com:443/",
        r"«[^»]+».properties.primaryEndpoints.blob": "https://x.blob.core.windows.net/",
    }
    known |= {
        r"«[^»]+».properties.ConnectionString": "InstrumentationKey=11111111-2222-3333-4444-555555555555;IngestionEndpoint=https://x.applicationinsights.azure.com/",
        r"«[^»]*»": "x",
    }
    env = environments(resources)["code-location"]
    for pattern, address in known.items():
        env = {name: re.sub(pattern, address, value) for name, value in env.items()}
    return Settings.from_env(env)


def read_by_dagster() -> set[str]:
    def names(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["env"]] if set(value) == {"env"} else [n for v in value.values() for n in names(v)]
        elif isinstance(value, list):
            yield from [n for v in value for n in names(v)]

    return {name for path in (INFRA / "dagster").glob("*.yaml") for name in names(yaml.safe_load(path.read_text()))}


def test_containers_get_the_variables_that_are_read(everything):
    asked = Asked()
    Settings.from_env(asked)
    read = asked.names | read_by_dagster() | {"AZURE_CLIENT_ID"}  # that one by azure-identity
    given = environments(everything)
    assert given.keys() == {"webserver", "daemon", "code-location"}
    for name, variables in given.items():
        assert variables.keys() <= read, name
        assert read_by_dagster() <= variables.keys(), name
    assert pipeline_settings(everything)


def test_the_function_app_gets_the_variables_that_are_read(everything):
    code = "".join(path.read_text() for path in (INFRA / "functions").glob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']""", code))
    # by the Functions host, by azure-identity
    read |= {f"AzureWebJobsStorage__{name}" for name in ("accountName", "clientId", "credential")}
    read |= {"APPLICATIONINSIGHTS_AUTHENTICATION_STRING", "APPLICATIONINSIGHTS_CONNECTION_STRING", "AZURE_CLIENT_ID"}
    (app,) = of_type(everything, "Microsoft.Web/sites")
    of_app = {s["name"]: s["value"] for s in properties(app)["siteConfig"].get("appSettings", [])}
    for config in of_type(everything, "Microsoft.Web/sites/config"):
        of_app |= properties(config)
    assert of_app.keys() <= read
    assert of_app


def test_one_image_runs_everywhere(everything):
    images = {c["image"] for app in of_type(everything, "Microsoft.App/containerApps") for c in properties(app)["template"]["containers"]}
    assert images == {NEEDED["image"]}
    assert not of_type(plan(INFRA / "main.bicep", **NEEDED | {"image": ""}), "Microsoft.App/containerApps")


# --- azd -------------------------------------------------------------------------------------------------------------------------


def test_azd_finds_what_azure_yaml_names(everything):
    azd = yaml.safe_load((ROOT / "azure.yaml").read_text())
    assert (ROOT / azd["infra"]["path"] / f"{azd['infra']['module']}.bicep").is_file()
    tagged = {(r.body.get("tags") or {}).get("azd-service-name") for r in everything} - {None}
    assert tagged == azd["services"].keys()
    for service in azd["services"].values():
        assert (ROOT / service["project"]).is_dir()
    hooks = [azd.get("hooks", {}), *(service.get("hooks", {}) for service in azd["services"].values())]
    scripts = [word for of in hooks for hook in of.values() for word in hook["run"].split() if word.endswith((".sh", ".py"))]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_parameters_from_azd_are_documented_variables():
    given = json.loads((INFRA / "main.parameters.json").read_text())["parameters"]
    names = {name for p in given.values() for name in re.findall(r"\$\{(\w+)", str(p.get("value")))}
    docs = "".join(path.read_text() for path in [*INFRA.glob("*.md"), ROOT / "docs/deploy.md", ROOT / "azure.yaml"])
    # azd sets these itself
    assert {name for name in names - {"AZURE_ENV_NAME", "AZURE_LOCATION", "AZURE_PRINCIPAL_ID", "AZURE_PRINCIPAL_TYPE"} if name not in docs} == set()
