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
    assert len(rows) == 14


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


def test_a_page_never_shows_other_pictures_or_another_stores_codes(run, tmp_path):
    import shutil

    out, _ = run
    with pytest.raises(ValueError, match="holds other pictures than the store was made of"):
        report_folder(out, title="t", images=open_images("world:shapes?n=60&image_px=32&seed=9"))
    shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/store")
    other = look(tmp_path / "other", seed=5)
    assert other
    shutil.copytree(tmp_path / "other/store", tmp_path / "copy/store")
    with pytest.raises(ValueError, match="are codes of another store"):
        report_folder(tmp_path / "copy", title="t")
    shutil.copytree(tmp_path / "other/codes", tmp_path / "copy/codes", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is an index of other codes"):
        report_folder(tmp_path / "copy", title="t")


def test_rows_are_read_back_only_for_the_same_coders(tmp_path, run):
    """Two Matryoshkas of the same weights differ in nothing but the k they are used at."""
    from vitrail.coders import make_coder
    from vitrail.studies.first_look import evaluate

    torch.manual_seed(0)
    backbone = wrap(
        ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=48), name="t"
    )
    images = open_images("world:shapes?n=12&image_px=32&split=test")

    def at(k, **options):
        coder = make_coder("matryoshka", d_in=24, d_sae=48, ks=[4, 8], inference_k=k, normalization="none")
        settings = dict(point=POINT, tokens="all", head=None, control_sample=None, **options)
        return evaluate(tmp_path / "eval.jsonl", backbone, images, {"m": coder}, **settings)[0]["measured"]["l0_tokens"]

    assert at(4)["value"] == 4
    with pytest.raises(ValueError, match="holds rows of another evaluation"):
        at(8)
    assert at(8, replace_rows=True)["value"] == 8
    (tmp_path / "eval.jsonl").write_text("not a table")
    with pytest.raises(ValueError, match="is not a table that `vitrail eval` wrote"):
        at(8)


def test_two_coders_of_one_name_are_refused(run, tmp_path):
    import shutil

    from vitrail.studies.first_look import load_coders

    shutil.copytree(run[0] / "coders/topk", tmp_path / "topk")
    with pytest.raises(ValueError, match="two coders are called 'topk'"):
        load_coders([run[0] / "coders/topk", tmp_path / "topk"], torch.device("cpu"))


def test_a_page_shows_the_names_of_vitrail_name(run, tmp_path):
    import shutil

    from vitrail.concepts.table import Concept, to_json, write_concepts

    shutil.copytree(run[0], tmp_path / "run")
    out = tmp_path / "run"
    rows = [
        Concept(
            latent=latent, method="top_images", name="<striped>", score=0.5, runner_up="dotted", runner_up_score=0.25,
            valid=latent % 2 == 0, detection_auc=0.91, detection_low=0.8, detection_high=1.0, detection_random=0.52,
        )
        for latent in range(96)
    ]  # fmt: skip
    write_concepts(out / "concepts/topk/concepts.parquet", rows)
    page = report_folder(out, title="t").read_text(encoding="utf-8")
    assert "48 latents have a valid name" in page
    told = "named <strong>&lt;striped&gt;</strong> by top_images, held-out AUC 0.91 (random names: 0.52)"
    shown = [int(number) for number in re.findall(r"<h3>latent (\d+)</h3>", page.split("Latents of topk")[1])]
    assert page.count(told) == sum(latent % 2 == 0 and latent < 96 for latent in shown) > 0
    assert "runner-up dotted 0.25" in page
    to_json(out / "concepts/topk/concepts.json", rows, {"coder_digest": "0" * 64})
    with pytest.raises(ValueError, match="names another coder than"):
        report_folder(out, title="t")


def test_a_coder_that_never_fires_still_has_a_page(tmp_path):
    from vitrail.coders import make_coder
    from vitrail.codes import encode
    from vitrail.index import build_index
    from vitrail.store import extract

    torch.manual_seed(0)
    backbone = wrap(
        ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=48), name="t"
    )
    store = extract(backbone, open_images("world:shapes?n=20&image_px=32"), [POINT], tmp_path / "store")
    coder = make_coder("relu", d_in=24, d_sae=16, normalization="none")
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    build_index(encode(coder, store, tmp_path / "codes/mute"), tmp_path / "index/mute")
    page = report_folder(tmp_path, title="t").read_text(encoding="utf-8")
    assert "16 latents, 16 never fired" in page
    assert "0 drawn at random among all that fire at all" in page
