"""What is asked about each picture, and what is looked for in its captions.

A prompt may hold ``{name}``, ``{directory}`` and any text column of the source, such as
``{tags}``; ``{{`` and ``}}`` are plain braces. The words of `discourage` are kept out by a logit
bias. The model may still spell them by other tokens, or the prefix hold them: where they come
up they are reported, so that such captions can be filtered or asked anew.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import ConfigError
from vlm.messages import parse_messages, user

_VARIABLE = re.compile(r"\{\{|\}\}|\{(\w+)\}")
DISCOURAGED = -100.0  # bias of a word; keeps it out unless logits are further apart
_KEY = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Caption:
    """One caption of a picture.

    Attributes:
        text: with prefix and suffix.
        finish_reason: as in `vlm.answers.Answer`.
        mean_logprob: as in `vlm.answers.Answer`.
        missing: words of `include` that it lacks.
        unwanted: words of `discourage` that it holds.
    """

    text: str
    finish_reason: str
    mean_logprob: float | None = None
    missing: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()


class CaptionPrompts:
    """The questions of a run.

    Args:
        prompt: one text, or several by a key each; every one gives a caption of its own.
        prefix: written before each caption.
        suffix: written after it.
        include: words that a caption should hold; what it lacks is reported.
        discourage: words that the model is kept from; what a caption holds is reported.

    Raises:
        ConfigError: no prompt, an empty word, or a key that is no name; MessageError: an
            empty prompt.
    """

    def __init__(
        self,
        prompt: str | Mapping[str, str],
        *,
        prefix: str = "",
        suffix: str = "",
        include: Sequence[str] = (),
        discourage: Sequence[str] = (),
    ) -> None:
        self.templates = {"caption": prompt} if isinstance(prompt, str) else dict(prompt)
        if not self.templates:
            raise ConfigError("there is no prompt; pass a text, or texts by their keys")
        for key, text in self.templates.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError(f"{key!r} is no key for a prompt; use letters, digits and _")
            parse_messages([user(text)])
        self.several = not isinstance(prompt, str)
        self.prefix, self.suffix = prefix, suffix
        self.include = _words("include", include)
        self.discourage = _words("discourage", discourage)

    @property
    def variables(self) -> frozenset[str]:
        """Names in braces."""
        found = (_VARIABLE.findall(text) for text in self.templates.values())
        return frozenset(name for names in found for name in names if name)

    @property
    def options(self) -> dict[str, Any]:
        """What differs from a plain run, for the ledger.

        Ledgers of versions that only reported `discourage` lack its bias, and so are others.
        """
        given = {
            "prefix": self.prefix,
            "suffix": self.suffix,
            "include": list(self.include),
            "discourage": list(self.discourage),
            "discourage_bias": DISCOURAGED if self.discourage else None,
        }
        return {key: value for key, value in given.items() if value}

    def steered(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling options that discourage words too; a bias given for the same word counts.

        Raises:
            ConfigError: a bias of the wrong type or out of range.
        """
        if not self.discourage:
            return dict(sampling)
        from vlm.engine.bias import checked_bias

        given = dict(checked_bias(sampling.get("logit_bias", ())))
        words = dict.fromkeys(self.discourage, DISCOURAGED)
        return {**sampling, "logit_bias": {**words, **given}}

    def questions(self, meta: Mapping[str, str]) -> dict[str, str]:
        """Every prompt with its variables filled in.

        Raises:
            ConfigError: a variable that this picture does not have.
        """
        lacking = sorted(self.variables - set(meta))
        if lacking:
            raise ConfigError(
                f"the prompt's {{{lacking[0]}}} is not known of this picture, only "
                f"{', '.join(sorted(meta))}; write {{{{ and }}}} for plain braces"
            )

        def fill(match: re.Match[str]) -> str:
            return meta[match[1]] if match[1] else match[0][0]

        return {key: _VARIABLE.sub(fill, text) for key, text in self.templates.items()}

    def caption(self, text: str, finish_reason: str, mean_logprob: float | None) -> Caption:
        """A caption of what the model answered."""
        text = f"{self.prefix}{text}{self.suffix}"
        return Caption(
            text,
            finish_reason,
            mean_logprob,
            tuple(word for word in self.include if not _holds(text, word)),
            tuple(word for word in self.discourage if _holds(text, word)),
        )

    def same(self, sha256: str, questions: Mapping[str, str]) -> bytes:
        """A key that two pictures share if one's captions are the other's."""
        text = json.dumps([sha256, questions if self.variables else None])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


def literal(text: str) -> str:
    """A text as a prompt without variables."""
    return text.replace("{", "{{").replace("}", "}}")


def _words(name: str, words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str):
        raise ConfigError(f"{name} is the text {words!r}; pass a list of words")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise ConfigError(f"{name} is {list(words)!r}; it must be a list of words, none empty")
    return tuple(words)


def _holds(text: str, word: str) -> bool:
    """Whether a word or phrase is in the text, in any case, not as a part of a longer word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
