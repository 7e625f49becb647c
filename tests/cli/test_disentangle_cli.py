"""vitrail disentangle: from a coder to its page; a task's coder; what the paper's digits say."""

import json

import pytest

from vitrail.backbones import load
from vitrail.cli import main
from vitrail.images import open_images
from vitrail.steering.task_coders import train_task_coder
from vitrail.training import TrainConfig

POINT = "blocks.3.hook_resid_post"
WORLD = "world:shapes?n=24&seed=1&background_bias=0.3"


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    config = TrainConfig(epochs=2, warmup_steps=1)
    images = open_images("world:shapes?n=24")
    train_task_coder(load("toy/clip"), images, out, point=POINT, tokens="cls", d_sae=32, k=4, config=config, copies=0)
    return out / "coder"


def test_a_coder_and_a_world_make_a_page(coder, tmp_path, capsys):
    arguments = ["disentangle", "run", str(coder), "--images", WORLD, "--spurious", "water", "--out", str(tmp_path)]
    more = ["--head", "linear", "--rules", "standardised", "--sides", "both", "--draws", "2", "--workers", "0"]
    main([*arguments, *more])
    said = capsys.readouterr().out
    assert "as it is: overall" in said
    assert "strict: latents of" in said
    told = json.loads((tmp_path / "disentangle.json").read_text())
    assert told["head"] == "linear"
    assert told["images"]["val"].endswith("split=val") or "split=val" in told["images"]["val"]
    assert (tmp_path / "report.html").is_file()


def test_prompts_are_one_a_class(coder, tmp_path, capsys):
    arguments = ["disentangle", "run", str(coder), "--images", WORLD, "--spurious", "water", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*arguments, "--prompts", "a boat", "--workers", "0"])
    assert "2 classes (land, water) need as many prompts" in capsys.readouterr().err


def test_the_papers_digits(capsys):
    main(["disentangle", "paper"])
    assert "| Table 1, CelebA, 7 |" in capsys.readouterr().out
