"""From what files say of classes (numbers, names, both, neither) to labels 0..n-1 and a name for each."""

from collections.abc import Sequence

_MOST_CLASSES = 1_000_000


def resolve_labels(
    labels: Sequence[str | int | None], names: Sequence[str | None], where: str
) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels and class names of pictures; None where a picture has neither.

    Whole numbers are labels, and `names` name them. Text labels are names. Names without numbers are numbered in sorted
    order. `where` begins error messages.
    """
    numbers = [_whole(label) for label in labels]
    given = [number for number in numbers if number is not None]
    if given and len(given) == sum(label is not None for label in labels):
        return numbers, _named(numbers, names, where)
    if given and any(isinstance(label, int) for label in labels):
        raise ValueError(
            f"{where} has labels that are numbers and labels that are text; use one kind for all pictures."
        )
    texts = [str(label) if label is not None else name for label, name in zip(labels, names, strict=True)]
    classes = tuple(sorted({text for text in texts if text is not None}))
    index = {name: label for label, name in enumerate(classes)}
    return [None if text is None else index[text] for text in texts], classes


def _named(numbers: list[int | None], names: Sequence[str | None], where: str) -> tuple[str, ...]:
    known: dict[int, str] = {}
    top = -1
    for number, name in zip(numbers, names, strict=True):
        if number is None:
            continue
        if not 0 <= number < _MOST_CLASSES:
            raise ValueError(f"{where} has label {number}; labels must be in 0..{_MOST_CLASSES - 1}.")
        top = max(top, number)
        if name is not None and known.setdefault(number, name) != name:
            raise ValueError(f"{where} names label {number} both {known[number]!r} and {name!r}; it needs one name.")
    return tuple(known.get(number, str(number)) for number in range(top + 1))


def _whole(label: str | int | None) -> int | None:
    if isinstance(label, int):
        return label
    if label is None or not label.lstrip("-").isdecimal():
        return None
    return int(label)
