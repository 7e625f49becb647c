"""The main job on a tiny model: every stage, the page, and doing nothing twice."""

import re
from html.parser import HTMLParser

import pytest
import torch

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.images import open_images
from vitrail.metrics.heads import own_head
from vitrail.studies import first_look as module
from vitrail.studies.first_look import CoderPlan, first_look, report_folder
from vitrail.studies.report import curve, heat_map
from vitrail.training import TrainConfig

POINT = "blocks.0.hook_resid_post"
PLANS = (
    CoderPlan("topk", "topk", {"d_sae": 48, "k": 4}),
    CoderPlan("batch", "batch_topk", {"d_sae": 48, "k": 4}),
)


def look(out, **options):
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=48)
    backbone = wrap(model, name="toy/t")
    return first_look(
        backbone,
        out,
        train_images=open_images("world:shapes?n=60&image_px=32"),
        held_out_images=open_images("world:shapes?n=20&image_px=32&split=val"),
        eval_images=open_images("world:shapes?n=24&image_px=32&split=test"),
        point=POINT,
        plans=PLANS,
        config=TrainConfig(epochs=2, warmup_steps=2, log_every=1, lr=1e-3),
        head=own_head(backbone),
        batch_size=200,
        title="a <tiny> look",
        **options,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("look")
    return out, look(out)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "line", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_every_stage_leaves_what_it_promised(run):
    out, rows = run
    assert {p.name for p in out.iterdir()} == {"store", "coders", "codes", "index", "eval.jsonl", "report.html"}
    assert [row["name"] for row in rows if row["control_of"] is None] == ["topk", "batch"]
    assert len(rows) == 12


def test_the_page_is_whole_and_self_contained(run):
    out, _ = run
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?://", text)
    assert "<script" not in text
    assert "a &lt;tiny&gt; look" in text
    assert "striped star" in text or "star" in text
    assert page.tags.count("article") == 24  # a dozen latents for each of two coders


def test_doing_it_again_does_nothing_twice(run, monkeypatch):
    out, rows = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".html"}
    monkeypatch.setattr(module, "prisma_table", lambda *a, **k: pytest.fail("measured again"))
    assert look(out) == rows
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix != ".html"} == before


def test_the_threshold_comes_from_held_out_images(run):
    from vitrail.coders import coder_metadata

    calibration = coder_metadata(run[0] / "coders" / "batch")["calibration"]
    assert calibration["rows"] == "held_out"


def test_the_saved_coder_says_where_it_belongs(run):
    from vitrail.coders import coder_metadata

    about = coder_metadata(run[0] / "coders" / "topk")
    assert (about["point"], about["tokens"], about["backbone"]) == (POINT, "all", "toy/t")
    assert about["images"].startswith("world:shapes?")


def test_a_page_without_pictures_still_comes(run, tmp_path):
    out, _ = run

    class Gone(type(open_images("world:shapes?n=60&image_px=32"))):
        def load(self, i):
            raise OSError("moved away")

    page = report_folder(out, title="t", images=Gone(n=60, image_px=32))
    assert 'class="bare"' in page.read_text(encoding="utf-8")
    report_folder(out, title="t")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no index: run `vitrail index`"):
        report_folder(tmp_path, title="t")


def test_a_heat_map_is_one_pixel_a_patch_and_dark_where_nothing_fires():
    import base64
    import io

    import numpy as np
    from PIL import Image

    uri = heat_map(np.array([[0.0, 0.5], [1.0, 2.0]], dtype=np.float32), scale=1.0)
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert image.size == (2, 2)
    alpha = np.asarray(image)[..., 3]
    assert alpha[0, 0] == round(255 * 0.68)
    assert alpha[1, 0] == alpha[1, 1] == 0
    assert 0 < alpha[0, 1] < 100


def test_a_curve_falls_where_its_numbers_fall():
    points = re.search(r'points="([^"]+)"', curve([(0, 1.0), (10, 0.1), (20, 0.01)])).group(1).split()
    ys = [float(point.split(",")[1]) for point in points]
    assert ys[0] < ys[1] < ys[2]  # an SVG's y grows downwards
