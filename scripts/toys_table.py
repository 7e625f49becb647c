"""The tables of docs/toys.md, from the JSONs beside the weights: python scripts/toys_table.py FOLDER [FOLDER ...]

Top-1 accuracy on held-out pictures, with 95 % Wilson intervals.
"""

import json
import sys
from pathlib import Path
from typing import Any

FAMILIES = ("class", "shape", "texture", "colour", "size", "position", "background")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    found = {path.stem: json.loads(path.read_text()) for folder in sys.argv[1:] for path in Path(folder).glob("*.json")}
    print("| toy | what it is | pictures | parameters | top-1 |\n|---|---|---|---|---|")
    for name, one in sorted(found.items(), key=lambda item: (item[1].get("kind") == "clip", item[0])):
        if one.get("kind") != "clip":
            shown = share(one["held_out"]["top1"])
            print(f"| `{name}` | {one['about']} | {one['recipe']['n_images']:,} | {one['n_parameters']:,} | {shown} |")
    for name, one in found.items():
        if one.get("kind") == "clip":
            worlds = one["held_out"]
            print(f"\n| `{name}` | {' | '.join(worlds)} |\n|---|{'---|' * len(worlds)}")
            for family in (*FAMILIES, "said_the_word"):
                cells = [share(world[family]) if family in world else "" for world in worlds.values()]
                print(f"| {family.replace('_', ' ')} | {' | '.join(cells)} |")
        if "steps" in one:
            print(f"\n| `{name}` after steps | pictures | top-1 |\n|---|---|---|")
            for kept in one["steps"]:
                print(f"| {kept['step']:,} | {kept['images']:,} | {share(kept['top1'])} |")


def share(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:.1%} ({found['low']:.1%}–{found['high']:.1%})"


if __name__ == "__main__":
    main()
