"""Strings that end a text: what may begin one is held back until the next text decides.

    stop = StopStrings(("END",)); stop.add("the E") -> "the "; stop.add("arth") -> "Earth"

The text ends where the first stop string is complete, so the result does not depend on how the text was split. A stop
string never spans an image: `flush` gives what is held before one, and at the end.
"""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, strings: Sequence[str] = ()):
        self.strings = strings
        self.held = ""
        self.met = False  # a stop string was complete: nothing more is to be sent

    def add(self, text: str) -> str:
        """Return what may be sent. Nothing more may be added once `met`."""
        self.held += text
        # The first to be complete; of two that are complete at once, the longer.
        ends = [(i + len(s), i) for s in self.strings if (i := self.held.find(s)) >= 0]
        self.met = bool(ends)
        n_sent = min(ends)[1] if ends else len(self.held) - self.n_open()
        sent, self.held = self.held[:n_sent], "" if ends else self.held[n_sent:]
        return sent

    def n_open(self) -> int:
        """Return how many last characters may begin a stop string."""
        longest = min(len(self.held), max(map(len, self.strings), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(s.startswith(self.held[-n:]) for s in self.strings):
                return n
        return 0

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text
