"""How long the stages of a selection and attention take: on some steps, and nobody waits for it."""

import time
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

SECONDS = 10  # from one sample to the next
STAGES = ("score_blocks", "recall_blocks", "refine_scores", "exact_scores", "attend")


class StageTimes:
    """Of one worker. In a sampled step the device marks the time around each stage of each layer,
    and a later step adds up what lies between the marks, once they are there.
    """

    def __init__(self, device: torch.device | str):
        self.on_gpu = torch.device(device).type != "cpu"
        self.spans: list[tuple[str, Any, Any]] = []
        self.tokens, self.next_at = 0, 0.0

    @property
    def is_due(self) -> bool:
        return not self.spans and time.monotonic() >= self.next_at

    def begin(self, tokens: int) -> None:
        """A step of so many query tokens is sampled."""
        self.tokens, self.next_at = tokens, time.monotonic() + SECONDS

    def around(self, stages: ModuleType) -> SimpleNamespace:
        """The same stages, timed."""

        def timed(name: str) -> Callable:
            stage = getattr(stages, name)

            def call(*args, **kwargs):
                start = self._mark()
                result = stage(*args, **kwargs)
                self.spans.append((name, start, self._mark()))
                return result

            return call

        return SimpleNamespace(**{name: timed(name) for name in STAGES})

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def collect(self, tell: Callable[[dict[str, float], int], None]) -> None:
        """In a later step: seconds by stage, of all layers, and the step's query tokens."""
        if not self.spans or (self.on_gpu and not self.spans[-1][2].query()):
            return
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
        self.spans.clear()
        tell(seconds, self.tokens)
