"""How the next token is chosen: greedy, or drawn from a reshaped distribution.

A schema rules tokens out first; then the order is that of transformers' `generate`: logit
bias, repetition penalty, temperature, top_k, top_p, min_p. Every request owns its random
generator, so a seeded answer does not depend on which other requests share its batch.

A token's logprob is the natural logarithm of its probability in the model's own
distribution: the softmax of the logits as they come, before any of the above. Only tokens
that are no text, such as the image token, have been ruled out by then. Shapes: B rows, V
vocabulary.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlm.engine.bias import Bias, Biases, Entries, checked_bias
from vlm.engine.checks import check_int, check_number, checked_stop_strings
from vlm.engine.grammar import Grammar, checked_schema
from vlm.errors import ConfigError, GenerationError

MAX_TEMPERATURE = 100.0
MAX_SEED = 2**63 - 1
MAX_PENALTY = 100.0
MAX_LOGPROBS = 20
BAD_LOGITS = (
    "the model computed NaN or infinite logits: its weights are damaged or its numbers"
    ' overflow in this precision; load it with dtype="float32" or "bfloat16"'
)
_COUNT = 2**31 - 1
_HEAD = 1024  # likeliest tokens, which nearly always reach top_p; sorting all is slow


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated; checked on creation.

    Greedy answers ignore top_k, top_p and min_p, which keep the likeliest token anyway.

    Args:
        max_new_tokens: the most tokens; None is 256, fewer where the context ends earlier.
        temperature: 0 is greedy; above 0 the logits are divided by it.
        top_p: nucleus sampling keeps the smallest set of tokens whose probability
            reaches ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751); 1 keeps all.
        seed: makes a sampled answer repeatable; None draws a fresh one.
        top_k: keeps the ``top_k`` likeliest tokens (Fan et al. 2018, arXiv:1805.04833),
            and those level with the last of them; 0 keeps all.
        min_p: keeps tokens of at least ``min_p`` times the probability of the likeliest
            one (Nguyen et al. 2024, arXiv:2407.01082); 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones,
            of all tokens of prompt and answer (Keskar et al. 2019, CTRL,
            arXiv:1909.05858), greedy answers included; what stands for a picture does not
            count. 1 changes nothing, below 1 encourages repetition.
        logit_bias: what to add to the logits of tokens, by their ids, or of words, by all
            their spellings (see `vlm.engine.bias`), greedy answers included; from -100,
            which keeps them out, to 100. Kept as a tuple of pairs.
        stop_strings: one string or up to 8, kept as a tuple; the answer ends before the
            first of them. They are looked for in its text, where special tokens are not.
        logprobs: how many of the likeliest tokens to report at each position, up to 20,
            beside the chosen one; None reports no single tokens.
        stop_loops: end an answer that repeats itself over and over, see
            `vlm.engine.loops`. Its first 47 tokens are never touched; off, a greedy
            answer is token by token that of transformers' `generate`, however long.
        json_schema: of the answer, as a mapping or text, see `vlm.engine.grammar`; kept as text.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Biases | Entries = ()
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    stop_loops: bool = True
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, 1, _COUNT)
        check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ConfigError("top_p is 0, which keeps no token; use a value above 0, up to 1")
        if self.seed is not None:
            check_int("seed", self.seed, 0, MAX_SEED)
        check_int("top_k", self.top_k, 0, _COUNT)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY)
        if self.repetition_penalty == 0.0:
            raise ConfigError("repetition_penalty is 0, which divides by 0; 1 turns it off")
        object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        object.__setattr__(self, "stop_strings", checked_stop_strings(self.stop_strings))
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.stop_loops, bool):
            raise ConfigError(f"stop_loops is {self.stop_loops!r}; it must be True or False")
        object.__setattr__(self, "json_schema", checked_schema(self.json_schema))


class Draw(NamedTuple):
    """A chosen token.

    Attributes:
        token: its id.
        logprob: of the token, by the model's own distribution.
        likeliest: as many (token, logprob) pairs as were asked for, likeliest first.
    """

    token: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: the request's settings.
        prompt: ids that the repetition penalty counts from the start.
        uncounted: ids that it never counts, such as the image token's.
        bias: of `sampling.logit_bias`, if it has any.
        grammar: of `sampling.json_schema`, if it has one.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        uncounted: Collection[int] = (),
        bias: Bias | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        assert (bias is None) == (not sampling.logit_bias), "a bias would be dropped"
        assert (grammar is None) == (sampling.json_schema is None), "a schema would be dropped"
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self._bias = bias
        self._grammar = grammar
        self._penalised = sampling.repetition_penalty != 1.0
        self._uncounted = frozenset(uncounted)
        self._prompt = frozenset(prompt) - self._uncounted if self._penalised else frozenset()
        self._counted: torch.Tensor | None = None  # flags (V,)

    @property
    def plain(self) -> bool:
        """Whether the model's likeliest token is always taken."""
        changed = self._penalised or self._bias is not None or self._grammar is not None
        return self._generator is None and not changed

    @property
    def failure(self) -> str | None:
        """Why no token can come any more."""
        return None if self._grammar is None else self._grammar.failure

    def pick(self, logits: torch.Tensor) -> int:
        """Draw one token; repetition penalty and bias count it from now on.

        Args:
            logits: (V,), any float dtype and device; free of NaN.
        """
        probabilities = self.probabilities(logits)
        token = len(probabilities)
        if self._generator is not None:
            total = probabilities.cumsum(dim=0)
            point = torch.rand(1, generator=self._generator, dtype=torch.float64) * total[-1]
            token = int(torch.searchsorted(total, point, right=True))
        if token == len(probabilities):  # greedy, or the product was rounded up
            token = int(probabilities.argmax())
        if self._counted is not None and token not in self._uncounted:
            self._counted[token] = True
        if self._bias is not None:
            self._bias.take(token)
        if self._grammar is not None:
            self._grammar.take(token)
        return token

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What the next token is drawn from: (V,), 0 for tokens that are left out.

        Args:
            logits: (V,), any float dtype and device; free of NaN.
        """
        # On the CPU and in double, so that one seed gives one answer on every device.
        scores = logits.detach().cpu().double()
        if self._grammar is not None:
            scores = self._grammar.restrict(scores)
        scores = self._penalise(scores if self._bias is None else self._bias.add_to(scores))
        settings = self.sampling
        if self._generator is None:
            return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
        # Less the highest first, or a temperature near 0 would overflow.
        scores = _top_k((scores - scores.max()) / settings.temperature, settings.top_k)
        kept = _nucleus(torch.softmax(scores, dim=-1), settings.top_p)
        if settings.min_p > 0:
            kept = kept * (kept >= settings.min_p * kept.max())
        return kept / kept.sum()

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._penalised:
            return logits
        if self._counted is None:
            # A head may be narrower than the vocabulary.
            known = [token for token in self._prompt if token < len(logits)]
            self._counted = torch.zeros(len(logits), dtype=torch.bool)
            self._counted[torch.tensor(known, dtype=torch.long)] = True
        penalty = self.sampling.repetition_penalty
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._counted, changed, logits)


def next_tokens(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Draw]:
    """One token for each row of a batch.

    Args:
        logits: (B, V) at the last position; -inf for tokens that are ruled out.
        samplers: B samplers, in row order.

    Raises:
        GenerationError: a row holds NaN or no finite logit; an argmax of such a row
            would be a stream of one meaningless token.
    """
    draws = [draw for draw in draw_rows(logits, samplers) if draw is not None]
    if len(draws) < len(samplers):
        failures = [each.failure for each in samplers if each.failure is not None]
        raise GenerationError(failures[0] if failures else BAD_LOGITS)
    return draws


def draw_rows(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Draw | None]:
    """As `next_tokens`, but with None for a row that would raise."""
    best, token = logits.max(dim=-1)  # max carries NaN through
    totals = torch.logsumexp(logits.float(), dim=-1)
    highest, log_totals = torch.stack([best.float(), totals]).tolist()
    tokens: list[int] = token.tolist()
    logprobs = [high - total for high, total in zip(highest, log_totals, strict=True)]
    sound = [math.isfinite(high) for high in highest]
    own = [row for row, each in enumerate(samplers) if sound[row] and not each.plain]
    if own:
        for row, scores in zip(own, logits[own].cpu().double(), strict=True):
            tokens[row] = samplers[row].pick(scores)
            logprobs[row] = float(scores[tokens[row]]) - log_totals[row]
    likeliest = _likeliest(logits, log_totals, [each.sampling.logprobs or 0 for each in samplers])
    return [
        Draw(tokens[row], logprobs[row], likeliest.get(row, ()))
        if sound[row] and each.failure is None
        else None
        for row, each in enumerate(samplers)
    ]


def _likeliest(
    logits: torch.Tensor, log_totals: list[float], numbers: list[int]
) -> dict[int, tuple[tuple[int, float], ...]]:
    """The `numbers[row]` likeliest tokens and their logprobs, for rows that want any."""
    asked = [row for row, number in enumerate(numbers) if number]
    if not asked:
        return {}
    found = logits[asked].float().topk(min(max(numbers), logits.shape[-1]))
    values, ids = found.values.tolist(), found.indices.tolist()
    return {
        row: tuple(
            (token, value - log_totals[row])
            for token, value in zip(ids[i][: numbers[row]], values[i], strict=False)
            if value > -math.inf
        )
        for i, row in enumerate(asked)
    }


def _top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rule out all tokens (V,) below the ``top_k``-th highest score."""
    if not 0 < top_k < len(scores):
        return scores
    return scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all tokens (V,) outside the smallest set that reaches ``top_p``."""
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.topk(min(_HEAD, len(probabilities)))
    if float(ordered.sum()) < top_p:
        ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the tokens ranked above this one
    return torch.zeros_like(probabilities).scatter(0, order, ordered * (before < top_p))
