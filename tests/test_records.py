"""A record is read back as it was written, refused by name where it is not one, and described by its schema."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jsonschema
import pytest

from unsleep.base import records
from unsleep.base.records import Count, Share, Words
from unsleep.core import BadInput, Site
from unsleep.pages.records import Report, Result


class Pair(NamedTuple):
    low: float
    high: float = 1.0


@dataclass(frozen=True)
class Part:
    name: str
    share: Share = 0.5

    def __post_init__(self) -> None:
        if not self.name:
            raise BadInput.of("name", self.name, "a name that is not empty")


@dataclass(frozen=True)
class Other:
    number: int


@dataclass(frozen=True)
class Ranked:
    ranks: dict[int, float]


@dataclass(frozen=True)
class Whole:
    SCHEMA: ClassVar = "test.whole/1"

    site: Site
    n: Count
    parts: tuple[Part | Other, ...]
    pair: Pair
    two: tuple[int, str]
    by_site: dict[Site, float]
    kind: Literal["a", "b"]
    word: Annotated[str, Words(("x", "y"))]
    flag: bool
    anything: Any
    free: float | None = None
    names: tuple[str, ...] = ()


WHOLE = Whole(
    site=Site(3),
    n=2,
    parts=(Part("one"), Other(4)),
    pair=Pair(0.5),
    two=(1, "b"),
    by_site={Site(1, "mlp"): 0.25},
    kind="a",
    word="y",
    flag=True,
    anything={"deep": [1, None, "text"]},
)


def changed(**change: Any) -> dict[str, Any]:
    return {**records.plain(WHOLE), **change}


def test_a_record_is_the_same_after_writing_and_reading(tmp_path: Path):
    records.save(WHOLE, tmp_path / "whole.json")
    assert records.load(Whole, tmp_path / "whole.json") == WHOLE
    found = json.loads((tmp_path / "whole.json").read_text())
    assert found["schema"] == "test.whole/1"
    assert found["site"] == "resid.3"
    assert found["by_site"] == {"mlp.1": 0.25}
    assert "free" not in found
    assert "names" not in found
    jsonschema.validate(found, records.json_schema(Whole))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": "test.whole/2"}, "whole.schema is 'test.whole/2'; expected test.whole/1"),
        ({"n": -1}, "whole.n is -1; expected a whole number, at least 0"),
        ({"n": 1.5}, "whole.n is 1.5; expected a whole number"),
        ({"n": True}, "whole.n is True; expected a whole number"),
        ({"site": "here"}, "whole.site: Site 'here' is unknown"),
        ({"parts": [{"name": 3}]}, "whole.parts[0].name is 3; expected text"),
        ({"parts": [{"name": ""}]}, "whole.parts[0].name is ''; expected a name that is not empty"),
        ({"parts": [{"name": "a", "share": 1.1}]}, "whole.parts[0].share is 1.1; expected a share from 0 to 1"),
        ({"parts": [{"name": "a", "more": 1}]}, "whole.parts[0] has 'more', which is unknown"),
        ({"parts": [{}]}, "whole.parts[0] has no 'number'; it has nothing"),
        ({"parts": {}}, "whole.parts is {}; expected a list"),
        ({"pair": {"low": math.nan}}, "whole.pair.low is nan; expected a finite number"),
        ({"pair": {"low": 10**300}}, "expected a finite number"),
        ({"pair": None}, "whole.pair is None; expected an object"),
        ({"two": [1]}, "whole.two is [1]; expected a list of 2"),
        ({"by_site": {"mlp.1": "x"}}, "whole.by_site.mlp.1 is 'x'; expected a finite number"),
        ({"kind": "c"}, "whole.kind is 'c'; expected one of a, b"),
        ({"word": []}, "whole.word is []; expected one of x, y"),
        ({"flag": 1}, "whole.flag is 1; expected true or false"),
        ({"anything": [{"a": math.inf}]}, "whole.anything[0].a is inf; expected a finite number"),
        ({"extra": 1}, "whole has 'extra', which is unknown"),
    ],
    ids=str,
)
def test_what_is_not_the_record_is_refused_by_place_value_and_expectation(
    tmp_path: Path, change: dict[str, Any], told: str
):
    (tmp_path / "whole.json").write_text(json.dumps(changed(**change)))
    with pytest.raises(BadInput, match=re.escape(told)) as error:
        records.load(Whole, tmp_path / "whole.json")
    assert str(tmp_path / "whole.json") in str(error.value)


@pytest.mark.parametrize("key", ["schema", "site", "n", "anything"])
def test_a_record_without_a_field_is_refused(key: str):
    with pytest.raises(BadInput, match=f"whole has no '{key}'"):
        records.parsed(Whole, {k: v for k, v in changed().items() if k != key}, "whole")


def test_keys_may_be_whole_numbers_and_what_lacks_a_field_is_told_by_the_class_it_is_most_like():
    assert records.parsed(Ranked, records.plain(Ranked({2: 0.5})), "one") == Ranked({2: 0.5})
    with pytest.raises(BadInput, match=r"one\.ranks is 'a'; expected a whole number"):
        records.parsed(Ranked, {"ranks": {"a": 0.5}}, "one")
    with pytest.raises(BadInput, match=r"whole\.parts\[0\] has no 'name'; it has 'share'"):
        records.parsed(Whole, changed(parts=[{"share": 0.5}]), "whole")


def test_the_written_schema_of_a_result_is_the_one_that_its_class_gives():
    written = json.loads(files("unsleep.pages").joinpath("result.schema.json").read_text(encoding="utf-8"))
    row = written["$defs"]["row"]

    def bare(schema: Any) -> Any:
        """Without words, references and what stands beside a form; words of a list in order."""
        if isinstance(schema, list):
            return sorted(map(bare, schema), key=str)
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return bare(row["properties"]["subject"] if schema["$ref"].endswith("subject") else row)
        left_out = ("$schema", "$id", "$defs", "title", "description", "if", "then")
        return {key: bare(value) for key, value in schema.items() if key not in left_out}

    assert bare(written) == bare(records.json_schema(Result))


def test_a_report_passes_the_schema_of_its_class():
    sample = json.loads((Path(__file__).parent / "data" / "report.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(records.json_schema(Report))
    jsonschema.validate(sample, records.json_schema(Report))
    assert records.plain(records.parsed(Report, sample, "report"))["result"] == sample["result"]
