"""A bar at the foot of a terminal while a run trains."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bigkernel.recipes.progress import TrainingProgress

# Characters of the bar, and of a terminal that has room for one.
BAR_WIDTH, WIDE = 16, 100


class TerminalProgress(TrainingProgress):
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def begin(self, step: int, steps: int) -> None:
        if self.console.is_terminal:
            # A narrow terminal is left to the numbers.
            bar = [BarColumn(bar_width=BAR_WIDTH)] if self.console.width >= WIDE else []
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                *bar,
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=steps, completed=step, text="starting")
            self._bar.start()

    def step(self, step: int, steps: int) -> None:
        if self._bar is not None:
            width = self.console.width - len(f"step {steps}/{steps} ")
            if len(self._bar.columns) > 2:
                width -= BAR_WIDTH + 1
            self._bar.update(self._task, completed=step, text=self.text(steps, width))

    def show(self, step: int, steps: int) -> None:
        if self._bar is None:
            super().show(step, steps)

    def close(self) -> None:
        """Give the terminal back; also when training ends by an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
