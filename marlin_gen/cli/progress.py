"""What long work shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from marlin_gen.cli.console import err, note
from marlin_gen.search.events import Progress as TuneProgress

QUIET_SECONDS = 15.0  # between two lines where there is no terminal

_PHASES = {"baselines": "yardsticks", "search": "searching", "finals": "finals"}


@contextmanager
def tune_progress() -> Iterator[Callable[[TuneProgress], None]]:
    """A function to call with every ``Progress`` of a tune."""
    with _display(TextColumn("{task.fields[state]}")) as show:

        def on_progress(now: TuneProgress) -> None:
            show(_PHASES.get(now.phase, now.phase), now.done, now.total, _state(now))

        yield on_progress


@contextmanager
def cells_progress(total: int, label: str) -> Iterator[Callable[[str], None]]:
    """A function to call after each cell with what to say about it."""
    done = 0
    with _display(TextColumn("{task.fields[state]}")) as show:
        show(label, 0, total, "")

        def advance(said: str) -> None:
            nonlocal done
            done += 1
            show(label, done, total, said)

        yield advance


@contextmanager
def counted_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function to call with (done, total, what was done last)."""
    with _display(TextColumn("{task.fields[state]}", markup=False)) as show:
        yield lambda done, total, said: show(label, done, total, said)


@contextmanager
def _display(extra: TextColumn) -> Iterator[Callable[[str, int, int, str], None]]:
    """show(phase, done, total, state): redraws the bar, or prints a line when the phase or enough time has passed."""
    if not err.is_terminal:
        yield _Lines()
        return
    bar = Progress(
        TextColumn("[bold]{task.description:10}"), BarColumn(24), MofNCompleteColumn(), extra,
        console=err, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None, state="")

        def show(phase: str, done: int, total: int, state: str) -> None:
            bar.update(task, description=phase, completed=done, total=total, state=state)

        yield show


class _Lines:
    """The same without a terminal: the first and last of each phase, and one every QUIET_SECONDS."""

    def __init__(self) -> None:
        self._phase = ""
        self._printed = -math.inf

    def __call__(self, phase: str, done: int, total: int, state: str) -> None:
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._printed < QUIET_SECONDS:
            return
        self._phase, self._printed = phase, now
        note(f"{phase:10} {done}/{total}  {state}".rstrip())


def _state(now: TuneProgress) -> str:
    """``best so far 0.83 of roofline, 12 failed, 3:05 left``: the mean is geometric, over the problems timed."""
    words = []
    if now.fractions:
        mean = math.exp(sum(math.log(value) for value in now.fractions.values()) / len(now.fractions))
        words.append(f"best so far {mean:.2f} of roofline")
    if failed := sum(now.failures.values()):
        words.append(f"{failed} failed")
    if now.phase == "search" and now.done:
        minutes, seconds = divmod(round(now.seconds_left), 60)
        words.append(f"{minutes}:{seconds:02} left")
    return ", ".join(words)
