"""Every route gives what the plain forward pass with a hook gives, on every kind of model that vitrail opens."""

import pytest
import torch

from backbones.small_backbones import CASES, build_case
from vitrail.coders import TopK
from vitrail.concepts.editing import Edit, edit_hook
from vitrail.metrics.heads import ZeroShotHead, own_head
from vitrail.statistics import ActivationStats
from vitrail.steering.closed_form import find_tail
from vitrail.steering.interventions import Dose, Intervention, Latents, intervention_hook, marked_tokens
from vitrail.steering.routes import answers, choose_route, look

STRENGTH = 40.0
# What each model's last layer and inner layers are steered by; all others must not be slower than before.
CLOSED = {
    "toy",
    "toy-clip",
    "toy-attention-only",
    "timm-vit",
    "timm-registers",
    "timm-average",
    "timm-eva",
    "open_clip",
    "open_clip-layer-scale",
    "open_clip-average",
    "hf-clip",
    "hf-vit-no-pooler",
    "hf-dinov2",
}
CLASS_TOKEN = {
    "toy",
    "toy-clip",
    "toy-attention-only",
    "timm-vit",
    "timm-registers",
    "open_clip",
    "open_clip-layer-scale",
    "hf-clip",
    "hf-vit",
    "hf-vit-no-pooler",
    "hf-dinov2",
    "hf-registers",
}

EVERY_TIME = {
    "toy-attention-only",
    "toy-clip",
    "timm-vit",
    "timm-registers-no-cls",
    "timm-siglip",
    "timm-average",
    "timm-eva",
    "open_clip",
    "open_clip-pooler",
    "hf-clip-projected",
    "hf-registers-classes",
    "hf-siglip",
}


def head_of(backbone, n=12):
    return ZeroShotHead(torch.randn(n, backbone.d_embed, generator=torch.Generator().manual_seed(3)), 30.0)


def coder_on(x, normalization="mean_std"):
    rows = x.flatten(0, -2)
    coder = TopK(d_in=x.shape[-1], d_sae=30, k=5, normalization=normalization, seed=2)
    coder.fit(ActivationStats.of(rows), rows)
    return coder.eval()


def naive(backbone, images, point, coder, latent, head, where, keep_error=True):
    """The whole forward pass with concepts.editing's own hook."""
    hook = edit_hook(backbone, point, coder, [Edit((latent,), "set", STRENGTH)], where=where, keep_error=keep_error)
    with torch.no_grad(), backbone.hooks({point: hook}):
        return answers(backbone, backbone.activations(images, ["hook_image_embed"])["hook_image_embed"], head)


@torch.no_grad()
def by_route(route, coder, which):
    basis = Latents(coder)
    which = torch.tensor(which)
    steps = basis.read(route.rows()).steps(which, Dose("set", STRENGTH))
    found = torch.full((len(which), *route.seen.probabilities.shape), torch.nan)
    for coordinates, images, p in route.probabilities(basis.directions(which), steps):
        found[coordinates, images] = p
    return found


def points_of(backbone):
    n = backbone.n_layers
    named = [f"blocks.{n - 1}.hook_resid_post", f"blocks.{n - 2}.hook_resid_post", "blocks.0.hook_resid_pre"]
    named += ["blocks.1.hook_attn_out", "ln_final.hook_normalized", "hook_image_embed"]
    return [point for point in named if point in backbone.points]


def look_at(case, point, head, n=3):
    images = case.images(n)
    seen = look(case.backbone, [images[:2], images[2:]], point, head)
    known = case.backbone.point(point)
    return images, seen, marked_tokens(case.backbone, point, "all") if known.has_tokens else None


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in sorted(CASES)]
)
def test_routes_are_the_naive_forward(name):
    case = build_case(name)
    backbone, head = case.backbone, head_of(case.backbone)
    for point in points_of(backbone):
        images, seen, marks = look_at(case, point, head)
        coder, which = coder_on(seen.x), [3, 17]
        route = choose_route(backbone, point, head, seen, marks)
        found = by_route(route, coder, which)
        assert (found - seen.probabilities).abs().max() > 1e-3, f"{point}: nothing was steered"
        for row, latent in enumerate(which):
            expected = naive(backbone, images, point, coder, latent, head, "all")
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=2e-5)
            apart = expected.sort(1).values.diff(dim=1).min() > 1e-4
            assert not apart or torch.equal(found[row].argsort(1), expected.argsort(1))
        last, inner = point.endswith(f"{backbone.n_layers - 1}.hook_resid_post"), point == "blocks.0.hook_resid_pre"
        assert not (last and name in CLOSED) or route.name == "closed"
        assert not (inner and name in CLASS_TOKEN) or route.name == "blocks+cls"
        assert point != "blocks.1.hook_attn_out" or route.name == "rerun"


@pytest.mark.parametrize("where", ["cls", "spatial", "marks"])
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("normalization", ["mean_std", "layer_norm"])
@pytest.mark.parametrize("name", ["toy-clip", "timm-average-cls"])
def test_routes_of_some_tokens_and_of_the_replacing_form(where, keep_error, normalization, name):
    case = build_case("timm-registers-no-cls" if name == "timm-average-cls" else name)
    if name == "timm-average-cls" and where == "cls":
        pytest.skip("this model has no class token")
    backbone, head = case.backbone, head_of(case.backbone)
    marks = torch.zeros(4, 4, dtype=torch.bool)
    marks[1, 2] = marks[3, 0] = True
    asked = marks if where == "marks" else where
    for point in points_of(backbone)[:2]:
        images, seen, _ = look_at(case, point, head)
        coder = coder_on(seen.x, normalization)
        used = marked_tokens(backbone, point, asked).expand(seen.x.shape[:2])
        base = None
        if not keep_error:
            with torch.no_grad():
                base = seen.x.clone()
                base[used] = coder(seen.x[used])
        route = choose_route(backbone, point, head, seen, used, base=base)
        found = by_route(route, coder, [1, 8])
        for row, latent in enumerate([1, 8]):
            expected = naive(backbone, images, point, coder, latent, head, asked, keep_error)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("route", ["closed", "blocks+cls", "blocks", "rerun"])
def test_all_routes_that_can_agree(route):
    case = build_case("toy-clip")
    point = "blocks.2.hook_resid_post" if route == "closed" else "blocks.0.hook_resid_post"
    head = head_of(case.backbone)
    _, seen, marks = look_at(case, point, head)
    coder = coder_on(seen.x)
    chosen = choose_route(case.backbone, point, head, seen, marks, route=route)
    assert chosen.name == route
    slow = choose_route(case.backbone, point, head, seen, marks, route="rerun")
    torch.testing.assert_close(by_route(chosen, coder, [2, 5]), by_route(slow, coder, [2, 5]), rtol=1e-4, atol=1e-5)


def test_a_step_of_nothing_leaves_the_blocks_route_bit_identical():
    case = build_case("toy-clip")
    head = head_of(case.backbone)
    _, seen, marks = look_at(case, "blocks.0.hook_resid_post", head)
    route = choose_route(case.backbone, "blocks.0.hook_resid_post", head, seen, marks, route="blocks")
    none = torch.zeros(len(route.rows()), 1)
    with torch.no_grad():
        (_, _, found), *more = route.probabilities(torch.randn(1, 24), none)
        assert not more
        again = answers(case.backbone, case.backbone.pool(case.backbone.run_blocks(seen.x, start=1)), head)
    assert torch.equal(found[0], again)


def test_many_coordinates_and_images_come_in_parts(monkeypatch):
    case = build_case("toy-clip")
    head = head_of(case.backbone)
    for point in ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post"):
        _, seen, marks = look_at(case, point, head)
        coder, which = coder_on(seen.x), list(range(7))
        route = choose_route(case.backbone, point, head, seen, marks)
        whole = by_route(route, coder, which)
        for numbers in (1, 60, 100):  # an image at a time, one coordinate at a time, two
            monkeypatch.setattr("vitrail.steering.closed_form.NUMBERS_AT_ONCE", numbers)
            monkeypatch.setattr("vitrail.steering.closed_form.parts_of.__defaults__", (numbers,))
            monkeypatch.setattr("vitrail.steering.routes.TOKENS_AT_ONCE", numbers)
            torch.testing.assert_close(by_route(route, coder, which), whole, rtol=1e-4, atol=1e-6)


def test_the_limit_is_where_large_steps_go():
    case = build_case("hf-clip")
    head = head_of(case.backbone)
    for point in ("blocks.2.hook_resid_post", "hook_image_embed"):
        _, seen, marks = look_at(case, point, head)
        route = choose_route(case.backbone, point, head, seen, marks)
        directions = torch.randn(4, seen.x.shape[-1], generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            limits = route.limits(directions)
            far = torch.full((len(route.rows()), 4), 1e6)
            for coordinates, images, p in route.probabilities(directions, far):
                torch.testing.assert_close(
                    p, limits[coordinates, None].expand_as(p[:, : p.shape[1]]), atol=1e-4, rtol=1e-3
                )
                assert images.stop <= 3


def test_a_models_own_classes_can_be_the_answer():
    case = build_case("timm-vit")
    backbone, head = case.backbone, own_head(case.backbone)
    point = "blocks.1.hook_resid_post"
    images, seen, marks = look_at(case, point, head)
    coder = coder_on(seen.x)
    route = choose_route(backbone, point, head, seen, marks)
    assert route.name == "blocks+cls"
    with torch.no_grad():
        hook = intervention_hook(backbone, Intervention(point, Latents(coder), [4], Dose("set", STRENGTH)))
        with backbone.hooks({point: hook}):
            expected = backbone(images).softmax(1)
    torch.testing.assert_close(by_route(route, coder, [4])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-siglip", "hf-vit", "open_clip-pooler", "timm-distilled"])
def test_a_pooling_that_is_not_of_the_form_is_found_out(name):
    case = build_case(name)
    point = "blocks.2.hook_resid_post"
    with torch.no_grad():
        assert find_tail(case.backbone, point, case.backbone.activations(case.images(2), [point])[point]) is None
    head = head_of(case.backbone)
    _, seen, marks = look_at(case, point, head)
    with pytest.raises(ValueError, match="cannot be steered by the route 'closed'"):
        choose_route(case.backbone, point, head, seen, marks, route="closed")


def test_what_cannot_be_is_told():
    case = build_case("toy-clip")
    point, wrong = "blocks.1.hook_resid_post", ZeroShotHead(torch.randn(4, 7), 30.0)
    with pytest.raises(ValueError, match="is 20 wide, the words' rows 7"):
        look(case.backbone, [case.images(2)], point, wrong)
    with pytest.raises(ValueError, match="no images"):
        look(case.backbone, [], point, head_of(case.backbone))
    _, seen, marks = look_at(case, point, head_of(case.backbone))
    with pytest.raises(ValueError, match="route must be auto"):
        choose_route(case.backbone, point, head_of(case.backbone), seen, marks, route="fast")
