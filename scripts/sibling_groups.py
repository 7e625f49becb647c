"""Write src/vitrail/metrics/hierarchies/imagenet.json: sibling groups of the ImageNet-1k classes, from WordNet 3.0.

    python scripts/sibling_groups.py path/to/wordnet-3.0/data.noun path/to/imagenet_synsets.txt

`data.noun` is WordNet 3.0's, whose offsets are the numbers of ImageNet's wnids (Debian: package wordnet-base).
`imagenet_synsets.txt` lists the 1,000 wnids (timm: timm/data/_info/). The file is frozen: metrics/hierarchies holds its
digest, and a change of it changes M7.

    depth 1   classes with a direct hypernym in common; a class with two hypernyms is in both groups
    depth 2   classes that are two steps below it

Groups of fewer than three are left out, and of two with the same classes the one that comes later in WordNet.
"""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "src" / "vitrail" / "metrics" / "hierarchies" / "imagenet.json"
MIN_SIZE = 3
NOTICE = (
    "Derived from WordNet 3.0. Copyright 2006 by Princeton University. All rights reserved. Permission to use, copy, "
    "modify and distribute this software and database and its documentation for any purpose and without fee or royalty "
    "is hereby granted, provided that you agree to comply with this copyright notice and statements, including the "
    'disclaimer: THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR '
    "WARRANTIES, EXPRESS OR IMPLIED."
)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    hypernyms, names = read_nouns(Path(sys.argv[1]))
    wnids = Path(sys.argv[2]).read_text(encoding="utf-8").split()
    text = written(sorted(wnids), groups_of(wnids, hypernyms, names))
    HERE.write_text(text, encoding="utf-8")
    print(f"{HERE}: sha256 {hashlib.sha256(text.encode()).hexdigest()}")


def read_nouns(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """wnid -> wnids of its hypernyms, in WordNet's order; wnid -> its first word."""
    hypernyms, names = {}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" | ")[0].split()
        n_words = int(fields[3], 16)
        at = 4 + 2 * n_words
        pointers = fields[at + 1 : at + 1 + 4 * int(fields[at])]
        wnid = f"n{fields[0]}"
        names[wnid] = fields[4]
        hypernyms[wnid] = [f"n{pointers[p + 1]}" for p in range(0, len(pointers), 4) if pointers[p] in ("@", "@i")]
    return hypernyms, names


def groups_of(wnids: list[str], hypernyms: dict[str, list[str]], names: dict[str, str]) -> list[dict[str, object]]:
    out, known = [], set()
    above = {wnid: [wnid] for wnid in wnids}
    for depth in (1, 2):
        above = {wnid: sorted({up for one in ups for up in hypernyms[one]}) for wnid, ups in above.items()}
        members = defaultdict(list)
        for wnid in sorted(wnids):
            for parent in above[wnid]:
                members[parent].append(wnid)
        for parent in sorted(members):
            classes = tuple(members[parent])
            if len(classes) >= MIN_SIZE and classes not in known:
                known.add(classes)
                out.append({"name": names[parent], "wnid": parent, "depth": depth, "classes": list(classes)})
    return out


def written(wnids: list[str], groups: list[dict[str, object]]) -> str:
    """A line a group. ImageNet-1k's labels are the places of its wnids in alphabetical order."""
    lines = ",\n".join(f"  {json.dumps(group)}" for group in groups)
    return f'{{\n "notice": {json.dumps(NOTICE)},\n "classes": {json.dumps(wnids)},\n "groups": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
