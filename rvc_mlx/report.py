"""What a conversion did, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        seconds: length of the recording.
        samples: samples written.
        sample_rate: of the result, Hz.
        stages: seconds spent per stage.
        joins: where windows or segments meet in the result, seconds from its start.
    """

    seconds: float = 0.0
    samples: int = 0
    sample_rate: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    # Seconds of finished stages within the one that is running.
    _inner: float = field(default=0.0, init=False, repr=False)
    joins: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a stage; not that of stages within it."""
        start = time.perf_counter()
        before, self._inner = self._inner, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            own = spent - self._inner
            self.stages[name] = self.stages.get(name, 0.0) + own
            self._inner = before + spent
