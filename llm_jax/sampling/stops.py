"""Where a text ends before its tokens do."""

from collections.abc import Sequence


class StopScanner:
    """Passes text through up to the first stop string, holding back what might begin one.

    The first is the one that is complete first; of those that end together, the longest. So what
    passes does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Takes text and returns what is certain to come before any stop string."""
        if self.is_stopped:
            return ""
        self._held += text
        starts = [(self._held.find(stop), len(stop)) for stop in self._stops]
        spans = [(start + length, start) for start, length in starts if start >= 0]
        if spans:
            self.is_stopped = True
            _, start = min(spans)
            return self._held[:start]
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """Returns what was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return "" if self.is_stopped else rest
