"""Tokens and words that are made more or less likely, before anything else looks at logits.

The rule is that of transformers' `SequenceBiasLogitsProcessor`: the bias of a sequence of
tokens is added to the logit of its last one, wherever the tokens before it are the newest of
prompt and answer. A word is the sequences of all its spellings. Shape: V vocabulary.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from vlm.engine.checks import check_int, check_number
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BIAS = 100.0
MAX_ENTRIES = 1024
MAX_WORD = 100
_KNOWN_WORDS = 4096  # spellings that are kept, over all tokenizers

Entries: TypeAlias = tuple[tuple[int | str, float], ...]
# A mapping is not covariant in its keys, so each kind is named.
Biases: TypeAlias = Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]


class Bias:
    """The logit biases of one answer.

    Args:
        biases: as `checked_bias` takes them.
        tokenizer: spells words.
        prompt: ids that stand before the answer.

    Raises:
        ConfigError: a token that the tokenizer does not have, or as `checked_bias`.
    """

    def __init__(
        self,
        biases: Biases | Entries,
        tokenizer: "PreTrainedTokenizerBase",
        prompt: Sequence[int] = (),
    ) -> None:
        sequences: dict[tuple[int, ...], float] = {}
        for key, value in checked_bias(biases):
            if isinstance(key, int) and key >= len(tokenizer):
                raise ConfigError(
                    f"logit_bias has token {key}, but the model has {len(tokenizer)} tokens, "
                    "counted from 0; look the id up in its tokenizer, or give the word"
                )
            for ids in spellings(tokenizer, key) if isinstance(key, str) else ((key,),):
                # Of words that are spelt alike the stronger one counts, not their sum.
                sequences[ids] = max(sequences.get(ids, 0.0), value, key=abs)
        self._single = {ids[0]: value for ids, value in sequences.items() if len(ids) == 1}
        self._longer = {ids: value for ids, value in sequences.items() if len(ids) > 1}
        self._reach = max(map(len, self._longer), default=1) - 1
        self._newest = tuple(prompt[-self._reach :]) if self._reach else ()

    def add_to(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) to biased ones, a new tensor; ids beyond a narrower head are passed over."""
        due = dict(self._single)
        for (*before, last), value in self._longer.items():
            if self._newest[-len(before) :] == tuple(before):
                due[last] = due.get(last, 0.0) + value
        known = [token for token in due if token < len(logits)]
        values = torch.tensor([due[token] for token in known], dtype=logits.dtype)
        places = torch.tensor(known, dtype=torch.long)
        return logits.index_add(0, places.to(logits.device), values.to(logits.device))

    def take(self, token: int) -> None:
        """Add the newest token of the answer."""
        if self._reach:
            self._newest = (*self._newest, token)[-self._reach :]


@functools.lru_cache(maxsize=_KNOWN_WORDS)
def spellings(tokenizer: "PreTrainedTokenizerBase", word: str) -> tuple[tuple[int, ...], ...]:
    """A word or phrase in tokens: as given, in small letters, with a capital, all in capitals.

    Each with and without a space before it. Spellings with an unknown token are left out: the
    model cannot write them. No special token comes up, whatever the word looks like.
    """
    written = dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:], word.upper()))
    texts = [space + each for each in written for space in ("", " ")]
    special = set(tokenizer.all_special_ids)
    found = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(dict.fromkeys(ids for ids in found if ids and special.isdisjoint(ids)))


def checked_bias(given: object) -> Entries:
    """Biases as pairs of a token id or a word and a number, which can be hashed.

    Args:
        given: a mapping, or what this returns.

    Raises:
        ConfigError: no mapping, too many, a key that is neither, or a number out of range.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    if not isinstance(pairs, Iterable) or isinstance(given, str | bytes):
        raise ConfigError(f"logit_bias is {given!r}; give a dict of token ids or words to numbers")
    entries = [_checked_entry(pair) for pair in pairs]
    if len(entries) > MAX_ENTRIES:
        raise ConfigError(f"logit_bias has {len(entries)} entries; at most {MAX_ENTRIES}")
    return tuple(entries)


def _checked_entry(pair: object) -> tuple[int | str, float]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ConfigError(f"logit_bias has {pair!r} in it, which is no token and number")
    key, value = pair
    check_number(f"logit_bias of {key!r}", value, -MAX_BIAS, MAX_BIAS)
    if not isinstance(key, str):
        check_int("a token of logit_bias", key, 0, 2**31 - 1)
    elif not key.strip() or len(key) > MAX_WORD:
        raise ConfigError(
            f"logit_bias has the word {key[:MAX_WORD]!r}; it must have 1 to {MAX_WORD} characters"
        )
    return key, float(value)
