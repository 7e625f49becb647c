"""What the train verb reads for transcoders and crosscoders."""

import pytest
import torch

from vitrail.backbones.toy import ToyViT, wrap
from vitrail.cli import main
from vitrail.cli.join import beside_when_encoding, joined, reads_several_points
from vitrail.coders import Codes, coder_metadata, make_coder
from vitrail.codes import CodeStore, encode
from vitrail.images import open_images
from vitrail.store import Store, extract
from vitrail.store.joined import Part
from vitrail.training import TrainConfig, train

READ, WRITTEN = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
ASKED = {"tokens": None, "batch_size": 64, "seed": 0, "held_out": 0.2}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    pictures = open_images("world:shapes?n=40&image_px=32")
    made = []
    for seed, width in ((0, 16), (1, 24)):
        torch.manual_seed(seed)
        model = ToyViT(image_px=32, patch_px=8, d_model=width, n_layers=1, n_heads=2, d_mlp=32, n_classes=5)
        out = tmp_path_factory.mktemp(f"model{seed}") / "s"
        extract(wrap(model, name=f"toy/{seed}"), pictures, [READ, WRITTEN], out, batch_size=8)
        made.append(out)
    return made


def test_a_transcoder_reads_one_point_and_writes_another(stores, tmp_path):
    asked = joined("topk_transcoder", stores[1], point=READ, to=WRITTEN, **ASKED)
    assert asked.widths == {"d_in": 24, "d_out": 24}
    assert (asked.source.n_rows, asked.held_out.n_rows) == (32 * 17, 8 * 17)
    assert asked.about["point"] == READ
    assert [part["point"] for part in asked.about["parts"]] == [READ, WRITTEN]
    assert asked.about["train_images"] == [0, 32]
    coder = make_coder("batch_topk_transcoder", d_sae=48, k=4, **asked.widths)
    config = TrainConfig(n_rows=2_000, lr=1e-3, warmup_steps=3)
    train(coder, asked.source, tmp_path, config=config, held_out=asked.held_out, metadata=asked.about)
    assert coder_metadata(tmp_path)["calibration"]["n_rows"] == 8 * 17
    assert coder_metadata(tmp_path)["parts"][1]["point"] == WRITTEN


@pytest.mark.parametrize("where", ["{other}", "{other}:" + READ])
def test_a_crosscoder_reads_two_models(stores, where):
    asked = joined("crosscoder", stores[0], point=READ, beside=[where.format(other=stores[1])], **ASKED)
    assert asked.widths == {"d_in": 40, "widths": [16, 24]}
    assert [part["backbone"] for part in asked.about["parts"]] == ["toy/0", "toy/1"]
    assert make_coder("crosscoder", d_sae=64, **asked.widths).n_sources == 2


def test_a_crosscoder_reads_two_points_and_another_model(stores):
    asked = joined("topk_crosscoder", stores[0], point=READ, beside=[WRITTEN, f"{stores[1]}:{WRITTEN}"], **ASKED)
    assert asked.widths["widths"] == [16, 16, 24]
    assert next(iter(asked.source)).shape == (64, 56)


def test_nothing_held_out(stores):
    assert joined("topk_transcoder", stores[0], point=READ, to=WRITTEN, **{**ASKED, "held_out": 0.0}).held_out is None


def test_wrong_asks_are_named(stores):
    def ask(architecture, **asked):
        return lambda: joined(architecture, stores[0], **{"point": READ, **asked}, **ASKED)

    wrong = {
        "topk reads one point; --to is of transcoders": ask("topk", to=WRITTEN),
        "topk_transcoder needs --point": ask("topk_transcoder", point=None, to=WRITTEN),
        "reads --point and writes --to, one each. The store holds blocks.0": ask("topk_transcoder"),
        "topk_transcoder reads --point and writes": ask("topk_transcoder", to=WRITTEN, beside=[READ]),
        "crosscoder needs --beside, one or more": ask("crosscoder"),
        "crosscoder needs --beside": ask("crosscoder", to=WRITTEN, beside=[WRITTEN]),
        "--beside 'blocks.7.x' is neither a point of the store": ask("crosscoder", beside=["blocks.7.x"]),
        "each point once": ask("crosscoder", beside=[READ]),
    }
    for sentence, call in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(KeyError, match="asked for 'blocks.7.x'"):
        ask("topk_transcoder", to="blocks.7.x")()
    assert [reads_several_points(name) for name in ("topk", "relu_transcoder", "crosscoder")] == [False, True, True]


@pytest.fixture(scope="module")
def crosscoder(stores, tmp_path_factory):
    asked = joined("topk_crosscoder", stores[0], point=READ, beside=[WRITTEN, str(stores[1])], **ASKED)
    coder = make_coder("topk_crosscoder", d_sae=48, k=4, **asked.widths)
    out = tmp_path_factory.mktemp("crosscoder")
    train(coder, asked.source, out, config=TrainConfig(n_rows=1_000), metadata=asked.about)
    return coder, out


@pytest.mark.parametrize("beside", [(), (WRITTEN, "{other}")])
def test_encode_reads_what_a_crosscoder_was_trained_on(stores, crosscoder, tmp_path, beside):
    coder, path = crosscoder
    main(["encode", str(path), str(stores[0]), str(tmp_path / "codes"), *with_option("--beside", beside, stores)])
    codes = CodeStore.open(tmp_path / "codes")
    assert (codes.n_images, codes.n_tokens) == (40, 17)
    kinds = ((stores[0], READ), (stores[0], WRITTEN), (stores[1], READ))
    by_hand = [torch.cat([x for _, x in Store.open(s).image_batches(p, "all")]).flatten(0, 1) for s, p in kinds]
    encoded = Codes.cat([part for _, part in codes.shards()]).to_dense()
    torch.testing.assert_close(encoded, coder.encode(coder.join(by_hand)), rtol=1e-3, atol=1e-5)


def with_option(name, words, stores):
    return [name, *(word.format(other=stores[1]) for word in words)] if words else []


def test_shards_of_other_sizes_are_joined(stores, crosscoder, tmp_path):
    coder, _ = crosscoder
    torch.manual_seed(1)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=1, n_heads=2, d_mlp=32, n_classes=5)
    pictures = open_images("world:shapes?n=40&image_px=32")
    other = extract(wrap(model, name="toy/1"), pictures, [READ], tmp_path / "s", batch_size=7, shard_images=7)
    first = Store.open(stores[0])
    beside = [Part(first, WRITTEN), Part(other, READ)]
    codes = encode(coder, first, tmp_path / "codes", point=READ, beside=beside, batch_images=9)
    as_before = encode(
        coder, first, tmp_path / "as_before", point=READ, beside=[beside[0], Part(Store.open(stores[1]), READ)]
    )
    for (_, a), (_, b) in zip(codes.shards(), as_before.shards(), strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-2, atol=1e-3)


def test_what_cannot_be_encoded_is_named(stores, crosscoder, tmp_path):
    coder, _ = crosscoder
    first = Store.open(stores[0])
    with pytest.raises(ValueError, match=r"takes d_in=56, but blocks.0.hook_resid_mid of .* is 16 wide\."):
        encode(coder, first, tmp_path / "a", point=READ)
    with pytest.raises(ValueError, match="a topk coder reads one point; --beside is of crosscoders"):
        beside_when_encoding(make_coder("topk", d_in=16, d_sae=32), {}, first, [READ])
    with pytest.raises(ValueError, match="does not say what it was trained on: name it with --beside"):
        beside_when_encoding(coder, {}, first, [])
