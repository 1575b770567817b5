"""A mixture of sources as a map-style data set that any number of processes can share."""

import bisect
import copy
import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from data_recipes.mix.order import draw
from vlm.errors import ConfigError
from vlm.messages import Record


class Records(Protocol):
    """Records by index, such as `vlm.record_files.RecordFiles`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class Mixture:
    """Records of several sources in one order that is settled beforehand.

    Eight bytes a record are in memory. Record i is the same however many ranks or workers
    share the mixture, and after any resume.

    Args:
        sources: records by index.
        counts: how many are taken of each; more than it has means several epochs.
        seed: of the order.
        shuffle: false keeps each source's own order; they alternate evenly all the same.

    Raises:
        ConfigError: records are wanted of an empty source.
    """

    def __init__(
        self,
        sources: Sequence[Records],
        counts: Sequence[int],
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._sources = sources
        sizes = [len(source) for source in sources]
        self._ends = list(accumulate(sizes))
        self._order = draw(sizes, counts, seed, shuffle)
        digest = hashlib.sha256(repr(sizes).encode())
        digest.update(self._order.astype("<i8").data)
        self._fingerprint = digest.hexdigest()
        self._first, self._rank, self._world = 0, 0, 1

    def __len__(self) -> int:
        left = len(self._order) - self._first - self._rank
        return max(0, -(-left // self._world))

    def __getitem__(self, index: int) -> Record:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(self._order[self._first + self._rank + index * self._world])
        source = bisect.bisect_right(self._ends, number)
        return self._sources[source][number - (self._ends[source - 1] if source else 0)]

    def fingerprint(self) -> str:
        """sha256 of the sources' sizes and the whole order."""
        return self._fingerprint

    def shard(self, rank: int, world: int) -> "Mixture":
        """What one of `world` processes has: every `world`-th record of this, from the rank's.

        The lower ranks have one more if the number does not divide.

        Raises:
            ConfigError: there is no such rank, or this is a shard itself.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"there is no rank {rank} of {world}; the first is 0")
        view = self._whole()
        view._rank, view._world = rank, world
        return view

    def state(self, taken: int) -> dict[str, Any]:
        """Where to go on, as JSON has it.

        Args:
            taken: how many records were taken of this; of a shard, by each rank.
        """
        position = min(self._first + taken * self._world, len(self._order))
        return {"order": self._fingerprint, "position": position}

    def resume(self, state: Mapping[str, Any]) -> "Mixture":
        """The rest of the mixture, from where a state was taken; on any number of ranks.

        Raises:
            ConfigError: the state is of another mixture, or this is a shard.
        """
        if state.get("order") != self._fingerprint:
            raise ConfigError(
                f"the state is of another mixture ({str(state.get('order'))[:12]}, this is "
                f"{self._fingerprint[:12]}); use the same sources, filters and seed"
            )
        view = self._whole()
        view._first = int(state["position"])
        return view

    def _whole(self) -> "Mixture":
        if self._world != 1:
            raise ConfigError("this is one rank's shard already; start from the whole mixture")
        return copy.copy(self)
