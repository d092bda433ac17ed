"""The deployment in infra/: checked as far as no Azure allows, by a checker that is shown to find each kind of fault."""

from pathlib import Path

import pytest

from aoai_usage_pipeline_tests.bicep import Project
from aoai_usage_pipeline_tests.bicep_types import own_type

ROOT = Path(__file__).parent.parent
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
