"""Answers that are JSON by a schema: what may come next, told by the llguidance library.

A token that would break the schema is ruled out before anything else looks at the logits,
so the answer is valid JSON whenever it ends by itself; one that reaches its limit is cut.
Shape: V vocabulary.
"""

import json
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from vlm.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_SCHEMA_LENGTH = 65_536
# One way to write spaces: a model that likes them would write them for ever.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_known: "weakref.WeakKeyDictionary[Any, dict[frozenset[int], LLTokenizer]]"
_known = weakref.WeakKeyDictionary()


class Grammar:
    """Which tokens one answer may have next.

    Args:
        schema: as `checked_schema` returns it.
        tokenizer: a fast one; spells the tokens.
        eos: tokens that may end the answer once it is whole.

    Attributes:
        failure: why no token may come any more; None while all is well.

    Raises:
        ConfigError: the schema is none, or has what the library cannot follow.
    """

    def __init__(self, schema: str, tokenizer: Any, eos: Collection[int]) -> None:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
        self._matcher = LLMatcher(_spelling(tokenizer, frozenset(eos)), grammar, log_level=0)
        self.failure: str | None = None
        if self._matcher.is_error():
            raise ConfigError(
                f"json_schema cannot be followed: {_line(self._matcher.get_error())}; "
                "simplify the schema"
            )

    def restrict(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (V,) with -inf for all tokens that may not come; unchanged after a failure."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            self._fail()
            return scores
        width = min(len(scores), len(allowed))  # a head may be wider than the vocabulary
        restricted = torch.full_like(scores, -torch.inf)
        restricted[:width] = scores[:width].masked_fill(allowed[:width] == 0, -torch.inf)
        if not restricted.max() > -torch.inf:
            self.failure = "no token of the model can continue the JSON; simplify the schema"
            return scores
        return restricted

    def take(self, token: int) -> None:
        """Count a token as written."""
        if self.failure is None and not self._matcher.consume_token(token):
            self._fail()

    def _fail(self) -> None:
        self.failure = f"the JSON cannot go on: {_line(self._matcher.get_error())}"


def checked_schema(given: object) -> str | None:
    """A JSON schema as text, from a mapping or its text; None for None.

    Raises:
        ConfigError: it is no JSON object, or too long.
    """
    if given is None:
        return None
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is no JSON ({type(error).__name__})") from error
    if not isinstance(schema, Mapping):
        raise ConfigError('json_schema must be an object, such as {"type": "object"}')
    if len(text) > MAX_SCHEMA_LENGTH:
        raise ConfigError(
            f"json_schema has {len(text):,} characters; at most {MAX_SCHEMA_LENGTH:,}"
        )
    return text


def _spelling(tokenizer: Any, eos: frozenset[int]) -> "LLTokenizer":
    """The library's own view of a tokenizer, made once: for large ones it takes a second."""
    made = _known.setdefault(tokenizer, {})
    if eos not in made:
        from llguidance import LLTokenizer

        try:
            made[eos] = LLTokenizer(_literal(tokenizer), eos_token=sorted(eos))
        except ValueError as error:
            raise ConfigError(
                f"json_schema is not possible with this model's tokenizer: {_line(str(error))}"
            ) from error
    return made[eos]


def _literal(tokenizer: Any) -> str:
    """A byte-level tokenizer that spells what it is given: no space before it, no case folded.

    The library looks up how a text that must come is spelt, and would take both for its text.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["padding"] = spec["truncation"] = None
    steps = spec["pre_tokenizer"] or {}
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
            spec["normalizer"] = None
    return json.dumps(spec)


def _line(text: str) -> str:
    """On one line, without the state that the library adds to some errors."""
    return " ".join(text.partition("<state>")[0].split())[:300]
