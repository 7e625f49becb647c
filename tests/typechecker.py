"""What jaxtyping's import hook checks annotations with: beartype, leaving `Self` out.

The hook decorates functions one by one, and beartype understands `Self` only when it decorates the whole class.
"""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

TOWER = BeartypeConf(is_pep484_tower=True)  # an int where a float is asked for, as type checkers have it


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    annotations = getattr(function, "__annotations__", {})
    for name in [name for name, hint in annotations.items() if "Self" in str(hint) and "typing" in str(hint)]:
        del annotations[name]
    return beartype(conf=TOWER)(function)


assert "typing.Self" in str(Self | None)
