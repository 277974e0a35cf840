"""Which of the workers' rows are free, and which the next plan must declare freed."""

import heapq


class RowPool:
    """Owns rows 0..num_rows-1. A row given back is declared in the next plan's ``freed_rows``."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))  # a heap: low rows first keep the batch dense
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        """Rows that ``take`` could hand out."""
        return len(self._free)

    def take(self) -> int:
        """Hand out the lowest free row."""
        return heapq.heappop(self._free)

    def give_back(self, row: int) -> None:
        """Free a row. It may be handed out again at once: plans free rows before they fill any."""
        heapq.heappush(self._free, row)
        self._freed.append(row)

    def take_freed(self) -> list[int]:
        """Rows freed since the last call, for the plan being built."""
        freed, self._freed = self._freed, []
        return freed
