"""The schemas in docs/schemas are those of the code, and what the code writes follows them."""

import json

import jsonschema
import pytest

from loadtest.records import to_json_line
from scripts.write_schemas import FORMATS, make_schemas
from tests.conftest import ROOT
from tests.loadtest.measurements import record, sample
from tests.loadtest.test_page import make_report

SCHEMAS = ROOT / "docs" / "schemas"


def test_the_published_schemas_are_current():
    published = {path.name: path.read_text() for path in SCHEMAS.iterdir()}
    assert published == make_schemas(), "run `python -m scripts.write_schemas docs/schemas`"
    assert len(published) == len(FORMATS)


def check(value, name):
    jsonschema.validate(value, json.loads((SCHEMAS / f"{name}.schema.json").read_text()))


@pytest.mark.parametrize("error", [None, "HTTP 500"])
def test_a_report_follows_its_schema(error):
    before, _ = make_report()
    report = json.loads(json.dumps(make_report(error=error, earlier=before)[0]))
    check(report, "loadtest-report")
    del report["candidates"]["pruned"]["verdict"]
    with pytest.raises(jsonschema.ValidationError, match="'verdict' is a required property"):
        check(report, "loadtest-report")


def test_raw_records_follow_their_schemas():
    check(json.loads(to_json_line(record())), "loadtest-records")
    check(json.loads(to_json_line(sample(1.0))), "loadtest-resources")
