"""Sibling groups of classes, frozen: the ImageNet-1k classes that have a parent in common in WordNet 3.0.

    imagenet_groups()                     {"terrier n02092468": (180, 182, ...), ...}, by ImageNet-1k's labels
    imagenet_groups(["n01443537", ...])   of a data set whose label i is the class of the i-th wnid

scripts/sibling_groups.py makes the file; its digest is below, and every number that rests on it says so in its tag.
ViSAEBench does not say which hierarchy its 60 coders were measured with. The released package has three: WordNet by
way of nltk (first hypernym), a file of 139 groups, and 26 lists typed in by hand. At depth 1, 86 of our 95 groups are
among that file's 92; classes with two hypernyms are why the others differ.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).with_name("imagenet.json")
DIGEST = "c5279dd50c00a3b9d98fcd536dbb446a68151602e1e6673578891a5677138e41"
MIN_SIZE = 3


def imagenet_groups(
    wnids: Sequence[str] | None = None, *, depth: int = 1, min_size: int = MIN_SIZE
) -> dict[str, tuple[int, ...]]:
    """Name of the parent -> labels of its classes. `depth` 1: a direct hypernym in common; 2: one two steps up.

    Groups with fewer than `min_size` of the given classes are left out. Raises ValueError for another depth, or where
    a wnid comes twice.
    """
    if depth not in (1, 2):
        raise ValueError(f"depth must be 1 (the parent) or 2 (the grandparent), got {depth}.")
    content = FILE.read_bytes()
    if hashlib.sha256(content).hexdigest() != DIGEST:
        raise ValueError(f"{FILE.name} is not the file it was: its digest differs. Install vitrail again.")
    found = json.loads(content)
    classes: Sequence[str] = found["classes"] if wnids is None else wnids
    label = {wnid: i for i, wnid in enumerate(classes)}
    if len(label) < len(classes):
        raise ValueError("wnids must be different from each other: one comes twice.")
    out = {}
    for group in found["groups"]:
        labels = tuple(sorted(label[wnid] for wnid in group["classes"] if wnid in label))
        if group["depth"] == depth and len(labels) >= min_size:
            out[f"{group['name']} {group['wnid']}"] = labels
    return out
