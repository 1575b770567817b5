"""How the next token is chosen: greedy, or temperature and nucleus sampling.

Every request owns its random generator, so a seeded answer does not depend on which
other requests share its batch.
"""

import math
from dataclasses import dataclass

import torch

from vlm.errors import ConfigError, GenerationError

MAX_TEMPERATURE = 100.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated; checked on creation.

    Args:
        max_new_tokens: the most tokens to generate; None takes up to
            256, fewer where the context ends earlier.
        temperature: 0 is greedy; above 0 the logits are divided by it.
        top_p: nucleus sampling keeps the smallest set of tokens whose probability
            reaches ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751); 1 keeps all.
        seed: makes a sampled answer repeatable; None draws a fresh one.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _check_int("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ConfigError("top_p is 0, which keeps no token; use a value above 0, up to 1")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: the request's settings.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self._generator is None

    def pick(self, logits: torch.Tensor) -> int:
        """Draw one token.

        Args:
            logits: (V,), any float dtype and device; free of NaN.
        """
        if self._generator is None:
            return int(logits.argmax())
        # On the CPU and in double, so that one seed gives one answer on every device.
        scaled = logits.detach().to("cpu", torch.float64) / self.sampling.temperature
        probabilities = _nucleus(torch.softmax(scaled, dim=-1), self.sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def next_tokens(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """One token for each row of a batch.

    Args:
        logits: (B, V) at the last position.
        samplers: B samplers, in row order.

    Raises:
        GenerationError: a row holds NaN or no finite logit; an argmax of such a row
            would be a stream of one meaningless token.
    """
    best, token = logits.max(dim=-1)  # max carries NaN through
    if not bool(torch.isfinite(best).all()):
        raise GenerationError(
            "the model computed NaN or infinite logits: its weights are damaged or its numbers"
            ' overflow in this precision; load it with dtype="float32" or "bfloat16"'
        )
    tokens: list[int] = token.tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.pick(logits[row])
    return tokens


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all tokens (V,) outside the smallest set that reaches ``top_p``."""
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the tokens ranked above this one
    return torch.zeros_like(probabilities).scatter(0, order, ordered * (before < top_p))


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
