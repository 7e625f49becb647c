"""What a study will cost, before it starts: an order of magnitude, not a promise."""

from typing import Any

from vitrail.images import open_images
from vitrail.studies.study_plan import StudyPlan

# Products a second, of fp32 multiply-adds counted as two: a laptop's core, this many cores, one large card in bf16.
DEVICES = {"1 core": 8e10, "16 cores": 1e12, "1 GPU": 2e14}


def estimate(plan: StudyPlan) -> list[dict[str, Any]]:
    """A row for each model: images, tokens, bytes on disk, FLOPs to extract, train and measure, hours by device.

    Tokens and bytes are those of all its points. Measuring counts the dense product that encodes, on all sets but
    "train", and the decoding; probes, which depend on classes and latents, are not in it. Backbones are built as the
    study builds them; nothing is extracted.
    """
    out = []
    n_images = {name: len(open_images(spec)) for name, spec in plan.images.items()}
    total = sum(n_images.values())
    for places in plan.models():
        first = places[0]
        backbone = first.loaded()
        grid = backbone.grid
        kind = first.tokens if first.tokens in ("all", "spatial", "cls") else "cls"
        tokens, n_bytes, training, measuring = 0, 0, 0.0, 0.0
        for point in dict.fromkeys(place.point for place in places):
            here = len(range(grid.n_tokens)[grid.tokens(kind)]) if backbone.point(point).has_tokens else 1
            tokens += total * here
            n_bytes += 2 * total * here * backbone.point(point).width
        for place in places:
            here = len(range(grid.n_tokens)[grid.tokens(kind)]) if backbone.point(place.point).has_tokens else 1
            width = backbone.point(place.point).width
            rows = plan.config.total_rows(n_images["train"] * here)
            for coder in plan.coders_of(place):
                d_sae, n = coder.arguments_at(width).get("d_sae", 8 * width), len(plan.seeds_of(coder))
                # where latents are found densely: the product forward and its two gradients, about 6 d d_sae a row
                training += 0.0 if coder.control_of else 6.0 * width * int(d_sae) * rows * n
                measuring += 2.0 * width * int(d_sae) * (total - n_images["train"]) * here * n
        weights = sum(weight.numel() for weight in backbone.parameters())
        forward = 2.0 * weights * grid.n_tokens * total
        flops = forward + training + measuring
        out.append(
            {
                "backbone": first.shown,
                "points": len({place.point for place in places}),
                "images": total,
                "tokens": tokens,
                "bytes": n_bytes,
                "extract_flops": forward,
                "train_flops": training,
                "measure_flops": measuring,
                "hours": {name: flops / speed / 3600 for name, speed in DEVICES.items()},
            }
        )
    return out
