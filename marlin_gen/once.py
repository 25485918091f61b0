"""What a process makes once, whichever thread asks first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


def once(make: Callable[..., T]) -> Callable[..., T]:
    """``functools.cache``, but threads that ask at the same time wait for the one that makes it."""
    made: dict[tuple[Any, ...], T] = {}
    lock = threading.RLock()

    @wraps(make)
    def found(*arguments: Any) -> T:
        if arguments not in made:
            with lock:
                if arguments not in made:
                    made[arguments] = make(*arguments)
        return made[arguments]

    return found
