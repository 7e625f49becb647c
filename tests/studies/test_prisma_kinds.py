"""The table for every kind of coder and head, its further metrics, and the backbone that has learnt nothing."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional import r2_score

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.backbones.toy_clip import ToyCLIP
from vitrail.backbones.toy_clip import wrap as wrap_clip
from vitrail.backbones.transcode import transcoding
from vitrail.coders import make_coder
from vitrail.images import load_batches, open_images
from vitrail.metrics.dead import Dead
from vitrail.metrics.frequency import FiringFrequency
from vitrail.metrics.heads import LinearHead, OwnHead, ZeroShotHead, own_head
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Metric
from vitrail.metrics.places import Place, place_in, place_of
from vitrail.metrics.substitution import RAW_NAMES, Rerun, class_columns, raw_name_head
from vitrail.statistics import ActivationStats
from vitrail.studies.prisma_controls import KMEANS_CENTROIDS, RandomWeights, controls_of, kmeans, ridge
from vitrail.studies.prisma_table import prisma_table

POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_attn_out")  # none undoes another
READ, WRITTEN = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
N = 12


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=48)
    nn.init.normal_(model.cls_token, std=0.5)
    return wrap(model, name="toy/t")


@pytest.fixture(scope="module")
def images():
    return open_images(f"world:shapes?n={N}&image_px=32&split=test")


@pytest.fixture(scope="module")
def pixels(backbone, images):
    return next(load_batches(images, range(N), backbone.preprocess, batch_size=N)).images


@pytest.fixture(scope="module")
def labels(images):
    return torch.tensor([images.record(i).label for i in range(N)])


@pytest.fixture(scope="module")
def activations(backbone, pixels):
    with torch.no_grad():
        return backbone.activations(pixels, list(backbone.points))


def rows_of(activations, *points, tokens=slice(None)):
    return torch.cat([activations[point][:, tokens].flatten(0, 1) for point in points], 1)


def fitted(architecture, sample, **arguments):
    coder = make_coder(architecture, **{"d_sae": 40, **arguments})
    coder.fit(ActivationStats.of(sample), sample)
    coder.calibrate([sample])
    return coder.eval().requires_grad_(False)


def sae(activations, point, **arguments):
    return fitted("topk", rows_of(activations, point), d_in=24, **{"k": 3, **arguments})


def transcoder(activations, **arguments):
    return fitted("topk_transcoder", rows_of(activations, READ, WRITTEN), d_in=24, d_out=24, **{"k": 3, **arguments})


def crosscoder(activations, **arguments):
    widths = [24] * len(POINTS)
    given = {"d_in": 72, "widths": widths, "k": 3, **arguments}
    return fitted("topk_crosscoder", rows_of(activations, *POINTS), **given)


def table(backbone, images, coders, **options):
    head = None if backbone.n_classes is None else own_head(backbone)
    defaults = dict(point=POINTS[0], tokens="all", head=head, control_sample=None, batch_size=5)
    rows = prisma_table(backbone, images, coders, **{**defaults, "n_bootstrap": 20, **options})
    return {row.name: row for row in rows}


def values(row):
    return {name: measured.value for name, measured in row.measured.items()}


def ev(x, x_hat):
    return float(r2_score(x_hat.double(), x.double(), multioutput="variance_weighted"))


def ce(logits, labels):
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


# -- transcoders


@pytest.mark.parametrize(("tokens", "n"), [("all", slice(None)), ("cls", slice(0, 1)), ("spatial", slice(1, 17))])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_measured_against_its_target_and_put_there(
    backbone, images, pixels, labels, activations, tokens, n, skip
):
    sample = rows_of(activations, READ, WRITTEN, tokens=n)
    coder = fitted("topk_transcoder", sample, d_in=24, d_out=24, k=3, skip=skip)
    if skip:
        nn.init.normal_(coder.W_skip, 0, 0.1)
    row = table(backbone, images, {"t": coder}, point=READ, target_point=WRITTEN, tokens=tokens)["t"]
    found = values(row)
    x_hat = coder(sample[:, :24])
    assert found["explained_variance"] == pytest.approx(ev(sample[:, 24:], x_hat), abs=1e-4)
    cosine = torch.cosine_similarity(x_hat, sample[:, 24:], dim=1).mean()
    assert found["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    with torch.no_grad():
        with transcoding(backbone, coder, READ, WRITTEN, tokens=tokens) as replaced:
            logits = replaced(pixels)
        zeroed = backbone.run_with_hooks(
            pixels,
            {
                WRITTEN: lambda x, _: torch.cat(
                    [x[:, : n.start or 0], 0 * x[:, n], x[:, 17 if n.stop is None else n.stop :]], 1
                )
            },
        )
    assert found["recon_ce"] == pytest.approx(ce(logits, labels), abs=1e-5)
    assert found["zero_ce"] == pytest.approx(ce(zeroed, labels), abs=1e-5)
    assert (row.about["point"], row.about["target_point"]) == (READ, WRITTEN)
    assert row.measured["recon_ce"].definition == "trained-tokens"


def test_a_transcoders_all_tokens_are_of_both_its_points(backbone, images, pixels, labels, activations):
    coder = fitted("topk_transcoder", rows_of(activations, READ, WRITTEN, tokens=slice(0, 1)), d_in=24, d_out=24, k=3)
    asked = {"point": READ, "target_point": WRITTEN, "tokens": "cls", "substitution": "all-tokens"}
    row = table(backbone, images, {"t": coder}, **asked)["t"]
    with torch.no_grad(), transcoding(backbone, coder, READ, WRITTEN, tokens="all") as replaced:
        assert row.measured["recon_ce"].value == pytest.approx(ce(replaced(pixels), labels), abs=1e-5)
    assert row.measured["recon_ce"].definition == "all-tokens"


# -- crosscoders


def test_a_crosscoder_is_measured_together_and_at_each_point(backbone, images, pixels, labels, activations):
    coder = crosscoder(activations)
    rows = table(backbone, images, {"x": coder}, points=POINTS)
    assert list(rows) == ["x", *(f"x @ {point}" for point in POINTS)]
    x = rows_of(activations, *POINTS)
    x_hat = coder(x)
    assert values(rows["x"])["explained_variance"] == pytest.approx(ev(x, x_hat), abs=1e-4)
    assert rows["x"].about["points"] == list(POINTS)
    put = {}
    for source, point in enumerate(POINTS):
        columns = slice(24 * source, 24 * source + 24)
        row = rows[f"x @ {point}"]
        assert values(row)["explained_variance"] == pytest.approx(ev(x[:, columns], x_hat[:, columns]), abs=1e-4)
        one = coder.decode_source(coder.encode_sparse(x), source)
        torch.testing.assert_close(one, x_hat[:, columns])
        put[point] = lambda _v, _p, one=one: one.reshape(N, 17, 24)
        with torch.no_grad():
            logits = backbone.run_with_hooks(pixels, {point: put[point]})
        assert values(row)["recon_ce"] == pytest.approx(ce(logits, labels), abs=1e-5)
        assert row.measured["recon_ce"].definition == "trained-tokens"
        assert row.about["point"] == point
        assert row.measured["l0_tokens"] == rows["x"].measured["l0_tokens"]
    with torch.no_grad():
        logits = backbone.run_with_hooks(pixels, put)
        zeroed = backbone.run_with_hooks(pixels, {point: lambda x, _: 0 * x for point in POINTS})
    assert values(rows["x"])["recon_ce"] == pytest.approx(ce(logits, labels), abs=1e-5)
    assert values(rows["x"])["zero_ce"] == pytest.approx(ce(zeroed, labels), abs=1e-5)
    assert rows["x"].measured["recon_ce"].definition == "trained-tokens/at-once"


# -- sets


def test_a_set_of_saes_is_spliced_in_together(backbone, images, pixels, labels, activations):
    coders = {point: sae(activations, point, seed=i) for i, point in enumerate(POINTS)}
    rows = table(backbone, images, {"s": dict(reversed(coders.items()))})
    assert set(rows) == {"s", *(f"s @ {point}" for point in POINTS)}
    assert next(iter(rows)) == "s"
    with torch.no_grad(), backbone.with_coders(coders) as spliced:
        expected = ce(spliced(pixels), labels)
    assert values(rows["s"])["recon_ce"] == pytest.approx(expected, abs=1e-5)
    assert rows["s"].measured["recon_ce"].definition == "trained-tokens/in-turn"
    with torch.no_grad():
        zeroed = backbone.run_with_hooks(pixels, {point: lambda x, _: 0 * x for point in POINTS})
    assert values(rows["s"])["zero_ce"] == pytest.approx(ce(zeroed, labels), abs=1e-5)
    x = rows_of(activations, *POINTS)
    x_hat = torch.cat([coder(rows_of(activations, point)) for point, coder in coders.items()], 1)
    assert values(rows["s"])["explained_variance"] == pytest.approx(ev(x, x_hat), abs=1e-4)
    l0 = [values(rows[f"s @ {point}"])["l0_tokens"] for point in POINTS]
    assert values(rows["s"])["l0_tokens"] == pytest.approx(sum(l0))
    assert rows["s"].about["d_sae"] == 120
    for point, coder in coders.items():
        alone = table(backbone, images, {"a": coder}, point=point)["a"]
        assert rows[f"s @ {point}"].measured == alone.measured


@pytest.mark.parametrize("tokens", ["cls", "spatial"])
def test_a_set_acts_on_the_chosen_tokens(backbone, images, pixels, labels, activations, tokens):
    positions = backbone.grid.tokens(tokens)
    coders = {
        p: fitted("topk", rows_of(activations, p, tokens=positions), d_in=24, k=2) for p in (POINTS[0], POINTS[1])
    }
    row = table(backbone, images, {"s": coders}, tokens=tokens)["s"]
    with torch.no_grad(), backbone.with_coders(coders, tokens=tokens) as spliced:
        assert values(row)["recon_ce"] == pytest.approx(ce(spliced(pixels), labels), abs=1e-5)


# -- controls of each kind


def test_every_kind_has_its_controls(backbone, images, activations):
    names = ["random", "pca", "pca_all", "neurons", "kmeans", "untrained"]
    found = table(
        backbone,
        images,
        {"t": transcoder(activations)},
        point=READ,
        target_point=WRITTEN,
        control_sample=rows_of(activations, READ, WRITTEN),
    )
    assert list(found) == ["t", *(f"t / {name}" for name in names)]
    found = table(
        backbone,
        images,
        {"x": crosscoder(activations)},
        points=POINTS,
        control_sample=rows_of(activations, *POINTS),
    )
    assert list(found)[:7] == ["x", *(f"x / {name}" for name in names)]
    assert list(found)[7:14] == [f"x @ {POINTS[0]}", *(f"x @ {POINTS[0]} / {name}" for name in names)]
    assert len(found) == 28
    coders = {point: sae(activations, point) for point in POINTS[:2]}
    found = table(backbone, images, {"s": coders}, control_sample={p: rows_of(activations, p) for p in POINTS[:2]})
    assert list(found)[:7] == ["s", *(f"s / {name}" for name in names)]
    assert found["s / kmeans"].control_of == "s"
    assert found[f"s @ {POINTS[1]} / pca"].control_of == f"s @ {POINTS[1]}"
    assert len(found) == 21
    for row in found.values():
        assert set(row.about["cost"]["control_fit_seconds"]) == {f"s @ {point}" for point in POINTS[:2]}
        json.dumps(row.to_json(), allow_nan=False)


def test_a_transcoders_pca_of_every_component_is_the_best_linear_map(activations):
    sample = rows_of(activations, READ, WRITTEN)
    x, target = sample[:, :24], sample[:, 24:]
    ones = torch.ones(len(x), 1)
    best = torch.cat([x, ones], 1) @ torch.linalg.lstsq(torch.cat([x, ones], 1), target).solution
    for skip in (False, True):
        coder = fitted("topk_transcoder", sample, d_in=24, d_out=24, k=24, skip=skip)
        found, _ = controls_of(coder, sample, k=24)
        torch.testing.assert_close(found["pca"](x), best, rtol=0, atol=2e-3)
    few, _ = controls_of(transcoder(activations), sample, k=3)
    explained = {name: ev(target, control(x).detach()) for name, control in few.items()}
    assert all(0 <= explained[name] < ev(target, best) for name in explained if name != "untrained")
    with pytest.raises(ValueError, match=r"rows of 48 values, all that it reads and writes side by side; .* has 24"):
        controls_of(coder, x, k=3)


def test_ridge_finds_a_planted_map():
    y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
    found, bias = ridge(y, y @ A + 3)
    torch.testing.assert_close(found, A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_crosscoders_controls_see_each_source_at_its_own_scale(activations):
    sample = rows_of(activations, *POINTS)
    sample[:, :24] *= 1000
    coder = fitted("topk_crosscoder", sample, d_in=72, widths=[24] * 3, k=3)
    found, _ = controls_of(coder, sample, k=12)
    small = slice(24, 48)
    assert ev(sample[:, small], found["pca"](sample)[:, small].detach()) > 0.1


def test_kmeans_is_kept_small_and_needs_no_more_rows_than_there_are(activations):
    sample = rows_of(activations, POINTS[0])
    wide = fitted("topk", sample, d_in=24, d_sae=2000, k=3)
    found = kmeans(wide, sample, k=3)
    assert found.d_sae <= min(KMEANS_CENTROIDS, len(sample))
    same = sample[:1].repeat(50, 1) + torch.arange(50)[:, None] % 4
    assert kmeans(wide, same, k=9).d_sae == 4


# -- a backbone that has learnt nothing


def test_random_weights_change_places_and_come_back(backbone, pixels):
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    clean = backbone(pixels)
    random = RandomWeights.of(backbone, seed=0)
    with random.within(backbone):
        assert not torch.allclose(backbone(pixels), clean)
        inside = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.module.state_dict().items())
    assert torch.equal(backbone(pixels), clean)
    assert random.how["cls_token"] == "permuted"
    assert random.how["blocks.0.mlp.0.weight"] == random.how["patch_embed.0.weight"] == "reset_parameters"
    assert not torch.equal(inside["cls_token"], before["cls_token"])
    assert torch.equal(inside["cls_token"].flatten().sort().values, before["cls_token"].flatten().sort().values)
    assert set(random.how) >= {name for name, _ in backbone.module.named_parameters()}
    again, other = RandomWeights.of(backbone, seed=0), RandomWeights.of(backbone, seed=1)
    assert again.to_json() == random.to_json()
    assert other.to_json()["digest"] != random.to_json()["digest"]
    assert random.to_json()["how"] == "permuted+reset_parameters"


def test_the_same_coder_stands_beside_itself_on_a_random_backbone(backbone, images, pixels, activations):
    coder = sae(activations, POINTS[0])
    plain = table(backbone, images, {"a": coder})
    rows = table(backbone, images, {"a": coder}, random_backbone="encode")
    assert list(rows) == ["a", "a / random backbone"]
    assert rows["a"].measured == plain["a"].measured
    beside = rows["a / random backbone"]
    assert beside.control_of == "a"
    assert beside.about["random_backbone"]["how"] == "permuted+reset_parameters"
    assert beside.about["backbone_digest"] == backbone.digest
    with RandomWeights.of(backbone, seed=0).within(backbone), torch.no_grad():
        x = backbone.activations(pixels, [POINTS[0]])[POINTS[0]].flatten(0, 1)
    assert values(beside)["explained_variance"] == pytest.approx(ev(x, coder(x)), rel=1e-3, abs=1e-3)
    assert "random_backbone" not in rows["a"].about
    many = table(
        backbone,
        images,
        {"x": crosscoder(activations), "s": {point: sae(activations, point) for point in POINTS[:2]}},
        points=POINTS,
        random_backbone="encode",
    )
    assert {"x / random backbone", f"x @ {POINTS[0]} / random backbone", "s / random backbone"} <= set(many)


# -- further metrics in the same pass


class Positions(Metric):
    def __init__(self, setting):
        self.setting, self.seen = setting, []

    def update(self, seen):
        assert seen.codes.n == seen.n_images * seen.n_tokens == seen.n_images * self.setting.n_tokens
        assert seen.x_hat.shape == seen.target.shape
        assert seen.labels is not None
        self.seen += list(seen.positions)

    def compute(self, *, n_bootstrap=1000, seed=0):
        return {"n_positions": Measured(value=float(len(self.seen)), definition="count", n=len(self.seen))}

    def curves(self):
        return {"positions": [{"at": position, "nothing": float("nan")} for position in self.seen]}


class Cosine(Positions):
    def compute(self, *, n_bootstrap=1000, seed=0):
        return {"cosine": Measured(value=2.0, definition="mine", n=1)}

    def curves(self):
        return {}


def test_further_metrics_share_the_pass_and_bring_curves(backbone, images, activations):
    coder = sae(activations, POINTS[0])
    plain = table(backbone, images, {"a": coder})["a"]
    further = [Positions, Dead, FiringFrequency, lambda setting: Dead(setting, rows="train")]
    row = table(backbone, images, {"a": coder}, metrics=further)["a"]
    assert row.measured["n_positions"].value == N
    assert {"dead_eval", "dead_train_rows"} <= set(row.measured)
    assert all(row.measured[name] == value for name, value in plain.measured.items())
    assert [one["at"] for one in row.curves["positions"]] == list(range(N))
    assert "firing_histogram" in row.curves
    again = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert again["curves"]["positions"][0] == {"at": 0, "nothing": None}
    assert "curves" not in plain.to_json()
    seconds = again["cost"]["metrics"]
    assert list(seconds) == ["Reconstructs", "CountsLatents", "Positions", "Dead", "FiringFrequency", "Dead 2"]
    assert all(value >= 0 for value in seconds.values())


def test_one_name_for_two_numbers_is_kept_twice(backbone, images, activations):
    coder = sae(activations, POINTS[0])
    with pytest.warns(UserWarning, match=r"two metrics measure 'cosine'; that of Cosine is 'cosine \(Cosine\)'"):
        row = table(backbone, images, {"a": coder}, metrics=[Cosine])["a"]
    assert row.measured["cosine"].definition == "per-row"
    assert row.measured["cosine (Cosine)"].value == 2.0


@pytest.mark.parametrize(
    ("tokens", "point", "cls_token", "patches"),
    [
        ("all", POINTS[0], 0, slice(1, 17)),
        ("cls", POINTS[0], 0, None),
        ("spatial", POINTS[0], None, slice(0, 16)),
        ("spatial", "hook_embed", None, slice(0, 16)),
        ("pooled", POINTS[0], None, None),
        ("all", "hook_image_embed", None, None),
    ],
)
def test_a_metric_is_told_which_rows_are_cls_and_patches(
    backbone, images, activations, tokens, point, cls_token, patches
):
    told = []

    def asked(setting):
        told.append(setting)
        return Positions(setting)

    coder = sae({**activations, "hook_image_embed": activations["hook_image_embed"][:, None]}, point)
    table(backbone, images, {"a": coder}, point=point, tokens=tokens, metrics=[asked], limit=7)
    assert (told[0].cls_token, told[0].patches, told[0].n_images) == (cls_token, patches, 7)


# -- heads


@pytest.fixture(scope="module")
def clip(images):
    torch.manual_seed(0)
    words = sorted({word for name in images.classes for word in name.split()} | {"a", "photo", "of"})
    vision = {"image_px": 32, "patch_px": 8, "d_model": 24, "n_layers": 2, "n_heads": 2, "d_mlp": 32}
    text = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 16}
    return wrap_clip(ToyCLIP(words=words, vision=vision, text=text, d_embed=20), name="toy/c")


def test_every_head_measures_the_same_reconstruction(clip, images, labels):
    pixels = next(load_batches(images, range(N), clip.preprocess, batch_size=N)).images
    with torch.no_grad():
        seen = clip.activations(pixels, [POINTS[0]])
    coder = sae(seen, POINTS[0])
    heads = {
        "none": None,
        "raw": raw_name_head(clip, images.classes),
        "linear": LinearHead(weight=torch.randn(48, 20), bias=torch.zeros(48)),
    }
    found = {name: table(clip, images, {"a": coder}, head=head)["a"] for name, head in heads.items()}
    plain = found["none"]
    assert {name for name in plain.measured if "ce" in name.split("_")} == set()
    assert "recon_cosine" in plain.measured
    assert plain.about["head"] is None
    for row in found.values():
        assert all(row.measured[name] == value for name, value in plain.measured.items())
    assert "ce_unscaled" in found["raw"].measured
    assert "ce_unscaled" not in found["linear"].measured
    with torch.no_grad(), clip.with_coders({POINTS[0]: coder}) as spliced:
        embedding = spliced(pixels)
    assert values(found["linear"])["recon_ce"] == pytest.approx(ce(heads["linear"](embedding), labels), abs=1e-5)
    text = torch.nn.functional.normalize(clip.text.encode(images.classes), dim=-1)
    cosines = torch.nn.functional.normalize(embedding, dim=-1) @ text.T
    raw = found["raw"]
    assert values(raw)["recon_ce_unscaled"] == pytest.approx(ce(cosines.detach(), labels), abs=1e-5)
    assert raw.about["head"]["kind"] == RAW_NAMES


def test_prismas_definition_is_of_raw_names_and_all_tokens(clip, images):
    pixels = next(load_batches(images, range(N), clip.preprocess, batch_size=N)).images
    with torch.no_grad():
        seen = clip.activations(pixels, [POINTS[0]])
    coder, head = sae(seen, POINTS[0]), raw_name_head(clip, images.classes)

    def tags(head, **options):
        row = table(clip, images, {"a": coder}, head=head, **options)["a"].measured
        assert row["recon_ce"].definition in ("trained-tokens", "all-tokens")
        names = ("ce_unscaled", "recon_ce_unscaled", "zero_ce_unscaled", "ce_recovered_unscaled")
        (tag,) = {row[name].definition for name in names}
        return tag, row

    tag, row = tags(head)
    assert tag == "prisma"
    clean, recon, zero = (row[f"{name}ce_unscaled"].value for name in ("", "recon_", "zero_"))
    assert row["ce_recovered_unscaled"].value == pytest.approx(100 * (zero - recon) / (zero - clean + 1e-6))
    assert tags(head, tokens="cls")[0] == "trained-tokens"
    assert tags(head, tokens="cls", substitution="all-tokens")[0] == "prisma"
    assert tags(ZeroShotHead(classes=head.classes, logit_scale=14.0))[0] == "trained-tokens"


# -- SPEC section M


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.lists(st.floats(-50, 50, allow_nan=False), min_size=12, max_size=12))
def test_a_constant_output_costs_at_least_the_log_of_the_classes(n_classes, repeats, logits):
    labels = torch.arange(n_classes).repeat(repeats)
    constant = torch.tensor(logits[:n_classes], dtype=torch.float64).expand(len(labels), n_classes)
    found = class_columns(OwnHead(n_classes=n_classes), constant, labels)["ce"].mean()
    assert float(found) >= math.log(n_classes) - 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(1e-3, 1e3))
def test_unscaled_ce_of_a_thousand_cosines_stays_in_its_range(seed, d_embed, size):
    generator = torch.Generator().manual_seed(seed)
    head = ZeroShotHead(classes=torch.randn(1000, d_embed, generator=generator), logit_scale=100.0)
    output = torch.randn(8, d_embed, generator=generator) * size
    labels = torch.randint(1000, (8,), generator=generator)
    found = class_columns(head, output, labels)["ce_unscaled"]
    assert float(found.min()) >= 4.9141 - 1e-4
    assert float(found.max()) <= 8.9069 + 1e-4


def test_both_ends_of_that_range_are_reached():
    # log(1 + 999 e^-2) = 4.9141 where the label's class alone is met, log(1 + 999 e^2) = 8.9069 where all others are.
    alone = torch.cat([torch.ones(1, 1), -torch.ones(999, 1)])
    for classes, expected in ((alone, 4.9141), (-alone, 8.9069)):
        head = ZeroShotHead(classes=classes, logit_scale=1.0)
        found = class_columns(head, torch.ones(1, 1), torch.tensor([0]))["ce_unscaled"]
        assert float(found) == pytest.approx(expected, abs=1e-4)


def test_identity_recovers_everything_and_zeros_nothing_of_every_kind(backbone, images, activations):
    sample = rows_of(activations, *POINTS)
    sizes = {"d_in": 72, "widths": [24] * 3}
    coder = fitted("topk_crosscoder", sample, **sizes, d_sae=144, k=72)
    coder.W_dec.copy_(torch.cat([torch.eye(72), -torch.eye(72)]))
    coder.W_enc.copy_(coder.W_dec.T)
    nothing = fitted("topk_crosscoder", sample, **sizes, k=1, normalization="none")
    nothing.b_enc.fill_(-1e9)
    rows = table(backbone, images, {"id": coder, "no": nothing}, points=POINTS)
    for name, row in rows.items():
        expected = 100 if name.startswith("id") else 0
        assert values(row)["ce_recovered"] == pytest.approx(expected, abs=0.1), name
    saes = {point: identity(activations, point) for point in POINTS}
    row = table(backbone, images, {"s": saes})["s"]
    assert values(row)["ce_recovered"] == pytest.approx(100, abs=0.1)
    target = rows_of(activations, READ, READ)
    same = fitted("topk_transcoder", target, d_in=24, d_out=24, d_sae=48, k=24)
    same.W_enc.copy_(torch.cat([torch.eye(24), -torch.eye(24)]).T)
    same.W_dec.copy_(same.W_enc.T)
    row = table(backbone, images, {"t": same}, point=READ, target_point=READ)["t"]
    assert values(row)["ce_recovered"] == pytest.approx(100, abs=0.1)
    assert values(row)["explained_variance"] == pytest.approx(1, abs=1e-5)


def identity(activations, point):
    sample = rows_of(activations, point)
    coder = make_coder("neurons", d_in=24, k=24)
    coder.fit(ActivationStats.of(sample), sample)
    return coder.eval().requires_grad_(False)


# -- what enters


def test_a_run_starts_again_at_the_earliest_point_that_is_replaced(backbone, pixels):
    with torch.no_grad():
        run = Rerun(backbone, POINTS, pixels)
        ran = []
        handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(backbone.blocks)]
        output, embedding = run.replaced_at({POINTS[2]: run.activations[POINTS[2]]})
        run.replaced_at({point: run.activations[point] for point in reversed(POINTS[1:])})
        for handle in handles:
            handle.remove()
        assert ran == [2, 1, 2]
        assert torch.equal(output, run.output)
        assert torch.equal(embedding, run.embedding)
        with pytest.raises(ValueError, match="was not named when the images were run"):
            run.replaced_at({READ: run.activation})


def test_metadata_says_where_a_coder_belongs(activations):
    parts = [{"point": point, "backbone_digest": "a"} for point in (READ, WRITTEN)]
    where = place_in({"point": READ, "tokens": "all", "parts": parts})
    assert place_of(transcoder(activations), **where) == Place((READ,), (WRITTEN,))
    told = place_in({"point": POINTS[0], "parts": [{"point": p, "backbone": "m"} for p in POINTS]})
    assert place_of(crosscoder(activations), **told) == Place(POINTS, POINTS)
    assert place_in({"point": READ, "target_point": WRITTEN}) == {"point": READ, "target_point": WRITTEN}
    with pytest.raises(ValueError, match="reads 2 models side by side"):
        place_in({"parts": [{"point": READ, "backbone": "a"}, {"point": READ, "backbone": "b"}]})


def test_what_does_not_fit_says_so(backbone, images, activations):
    t, x = transcoder(activations), crosscoder(activations)
    with pytest.raises(ValueError, match="coder t is a topk_transcoder: say with target_point which hook point"):
        table(backbone, images, {"t": t})
    with pytest.raises(ValueError, match="is computed after"):
        table(backbone, images, {"t": t}, point=WRITTEN, target_point=READ)
    with pytest.raises(ValueError, match="topk_crosscoder of 3 sources: say with points"):
        table(backbone, images, {"x": x}, points=POINTS[:2])
    with pytest.raises(ValueError, match="is a set of coders to be put in together: SAEs"):
        table(backbone, images, {"s": {READ: t, WRITTEN: sae(activations, WRITTEN)}}, target_point=WRITTEN)
    with pytest.raises(ValueError, match="is a set of 1 coders; give two points or more"):
        table(backbone, images, {"s": {READ: sae(activations, READ)}})
    with pytest.raises(ValueError, match=r"rows of 24 values; a topk_transcoder coder of .* needs 48"):
        table(backbone, images, {"t": t}, target_point=WRITTEN, control_sample=rows_of(activations, READ))
    with pytest.raises(ValueError, match="control_sample has no rows of blocks"):
        table(backbone, images, {"a": sae(activations, READ)}, point=READ, control_sample={WRITTEN: torch.zeros(3, 24)})
    with pytest.raises(ValueError, match="random_backbone must be 'encode', RandomCoders or None"):
        table(backbone, images, {"a": sae(activations, POINTS[0])}, random_backbone="train")
    mixed = {p: sae({**activations, p: activations[p]}, p) for p in ("hook_embed", POINTS[0])}
    with pytest.raises(ValueError, match="have not the same rows of 'all' tokens per image: hook_embed 16"):
        table(backbone, images, {"s": mixed})
