"""JSON answers: the jsonschema library is the oracle of random weights held to a schema."""

import json
from typing import Any

import jsonschema
import pytest

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.engine.sampling import Sampling
from vlm.errors import ConfigError

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "count", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return load(testing.tiny_llava_folder(tmp_path_factory.mktemp("grammar") / "tiny", seed=2))


def test_answers_keep_to_the_schema_beside_free_ones(model: Assistant) -> None:
    free: dict[str, Any] = {"max_new_tokens": 60, "stop_loops": False}
    held = {**free, "json_schema": SCHEMA}
    drawn = [{**held, "temperature": 2.0, "seed": seed} for seed in range(6)]
    chat = [{"role": "user", "content": "how many?"}]
    requests = [model.prepare(chat, **options) for options in (free, held, *drawn)]
    answers = model.run(requests)
    assert answers[0].text == model.generate([chat], **free)[0].text
    for answer in answers[1:]:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert len({answer.text for answer in answers[1:]}) > 2


def test_an_answer_that_is_cut_says_so(model: Assistant) -> None:
    (answer,) = model.generate(
        [[{"role": "user", "content": "x"}]], json_schema=SCHEMA, max_new_tokens=5
    )
    assert answer.finish_reason == "length" and answer.text.startswith('{"col')


def test_logprobs_stay_those_of_the_model(model: Assistant) -> None:
    chat = [{"role": "user", "content": "x"}]
    held, free = (
        model.run([model.prepare(chat, logprobs=2, max_new_tokens=1, **more)])[0]
        for more in ({"json_schema": {"type": "object"}}, {})
    )
    assert held.tokens and free.tokens and held.text == "{"
    assert held.tokens[0].alternatives == free.tokens[0].alternatives
    assert held.tokens[0].logprob < free.tokens[0].logprob


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "nope"}, "Invalid type"),
        ({"$ref": "http://10.0.0.1/x.json"}, "does not fetch"),
        ({"type": "string", "pattern": "["}, "regex"),
        ({"not": {}}, "Unimplemented"),
    ],
)
def test_a_schema_that_cannot_be_followed(model: Assistant, schema: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model.generate([[{"role": "user", "content": "x"}]], json_schema=schema)


@pytest.mark.parametrize("schema", [5, "{", [], {"a": {1}}, "[1]", {"title": "x" * 70_000}])
def test_what_is_no_schema(schema: Any) -> None:
    with pytest.raises(ConfigError, match="json_schema"):
        Sampling(json_schema=schema)


def test_a_grammar_that_fails_ends_its_answer_alone(model: Assistant) -> None:
    chat = [{"role": "user", "content": "x"}]
    bad, good = (
        model.prepare(chat, max_new_tokens=4, **more) for more in ({"json_schema": SCHEMA}, {})
    )
    tasks = model.engine.submit([bad, good])  # type: ignore[union-attr]
    tasks[0].sampler._grammar.take(7)  # no JSON begins with it
    while not all(task.ended for task in tasks):
        model.engine.step()  # type: ignore[union-attr]
    with pytest.raises(Exception, match="JSON cannot go on"):
        tasks[0].result()
    assert len(tasks[1].result().ids) == 4


def test_a_tokenizer_that_adds_a_space_and_folds_case() -> None:
    """The built-in model's: what must come is spelt as it is, capitals too."""
    schema = {
        "type": "object",
        "properties": {"Any Colour": {"enum": ["Red"]}},
        "required": ["Any Colour"],
        "additionalProperties": False,
    }
    (answer,) = load().generate([[{"role": "user", "content": "x"}]], json_schema=schema)
    assert answer.text == '{"Any Colour": "Red"}'
