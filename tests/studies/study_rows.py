"""Made-up rows of a study, by the contract of studies, with planted relations."""

import numpy as np

EFFECT = {"moran": 0.2, "fvu": -0.05, "preservation": -0.01, "ovr_auc_128": 0.03, "absorption": -0.1}
BASE = {"moran": 0.2, "fvu": 0.4, "preservation": 0.97, "ovr_auc_128": 0.8, "absorption": 0.6}
GRID = ((4, 16), (4, 32), (8, 16), (8, 32))


def measured(value, low=None, high=None):
    return {
        "value": None if value is None else float(value),
        "definition": "made up",
        "n": 100,
        "low": low,
        "high": high,
    }


def made_up(n_backbones=5, families=("batch_topk",), seeds=(0,), *, grid=GRID, noise=0.0, layers=False, controls=False):
    """Backbone i is i steps along EFFECT, k = 32 adds .01 a metric, and tasks follow moran (up) in their ranks.

    The rank of fvu over backbones falls and within one rises with preservation; seeds differ by `noise`.
    """
    rng, out = np.random.default_rng(0), []
    for i in range(n_backbones):
        for f, family in enumerate(families):
            for expansion, k in grid:
                for seed in seeds:
                    levels = {
                        name: BASE[name] + step * i + 0.01 * (k == 32) + 0.002 * f + noise * rng.normal()
                        for name, step in EFFECT.items()
                    }
                    out.append(row(f"net{i}", f"{family}-{expansion}x-k{k}", family, expansion, k, seed, levels, i))
    if controls:
        first = out[0]
        levels = {"fvu": 0.9, "moran": 0.01}
        out.append(row("net0", "random", "random", 4, 16, 0, levels, 0, role="control", control_of=first["coder"]))
    if layers:
        for one in [one for one in out if one["role"] == "main" and one["seed"] == 0]:
            values = {name: of["value"] for name, of in one["measured"].items()}
            values["moran"] -= 0.1
            moved = {**one, "role": "layer", "backbone": f"{one['backbone']} early", "layer": 3}
            out.append(
                {**moved, "point": "blocks.3.hook_resid_post", "measured": {n: measured(v) for n, v in values.items()}}
            )
    return out


def row(backbone, coder, family, expansion, k, seed, levels, i, role="main", control_of=None):
    tasks = {}
    if role == "main":
        for stem in ("retrieval_r@1", "retrieval_r@5", "linear_accuracy@test", "segmentation_miou@coco"):
            name, _, where = stem.replace("r@", "r%").partition("@")
            name, end = name.replace("%", "@"), f"@{where}" if where else ""
            raw, codes = 0.4 + 0.05 * i, 0.35 + 0.05 * i + 0.001 * k
            tasks |= {f"{name}_raw{end}": raw, f"{name}_recon{end}": raw - 0.02, f"{name}_codes{end}": codes}
            tasks[f"{name}_lift{end}"] = codes / raw
        tasks["cross_domain_raw_accuracy@drawings"] = 0.3 + 0.02 * i
        tasks["cross_domain_codes_accuracy_128@drawings"] = 0.3 + 0.02 * i + 0.0001 * k
        tasks["cross_domain_preservation@drawings"] = 0.9 + 0.01 * ((i * 2) % 5)
        tasks |= {"l0_tokens": k + (5 if expansion == 8 and k == 32 else 1), "raw_moran": 0.5 + 0.05 * i}
        tasks |= {"moran_null": -1 / 195, "moran_evaluable": 0.7}
    edges = np.linspace(-0.2, 1, 25)
    center = levels["moran"]
    counts = np.round(200 * np.exp(-(((edges[:-1] - center) / 0.15) ** 2))).astype(int)
    bins = [
        {"low": float(a), "high": float(b), "latents": int(n), "share": 0.0}
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    probing = [{"k": j, "ovr_auc": 1 - (0.4 - 0.02 * i) / j**0.5, "multi_acc": 0.5} for j in (1, 4, 16, 64, 128)]
    return {
        "name": f"{backbone} / {coder}#{seed}", "backbone": backbone, "model": backbone, "backbone_digest": f"d{i}",
        "point": "blocks.11.hook_resid_post", "layer": 11, "tokens": "spatial", "role": role, "coder": coder,
        "architecture": family, "d_in": 64, "d_sae": 64 * expansion, "expansion": float(expansion), "k": k,
        "seed": seed, "control_of": control_of,
        "measured": {name: measured(value) for name, value in {**levels, **tasks}.items()},
        "curves": {"moran_histogram": bins, "raw_moran_histogram": bins[::-1], "sparse_probing": probing},
        "cost": {"train_seconds": 10.0, "measure_seconds": 2.0, "peak_memory_mb": 900 + i,
                 "seconds_by_metric": {"moran": 1.5, "probing": 0.5}},
        "config": {}, "coder_digest": f"{backbone}{coder}{seed}", "provenance": {}, "cell": "c",
    }  # fmt: skip
