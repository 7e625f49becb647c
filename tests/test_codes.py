"""Codes on disk: what the coder says, row by row, and nothing dense."""

import numpy as np
import pytest
import torch

from vitrail import codes as codes_module
from vitrail.backbones.toy import ToyViT, wrap
from vitrail.coders import make_coder, save_coder
from vitrail.codes import CodeStore, encode
from vitrail.images import open_images
from vitrail.store import extract

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=5)
    images = open_images("world:shapes?n=20&image_px=32")
    out = tmp_path_factory.mktemp("codes") / "store"
    return extract(wrap(model, name="toy/t"), images, [POINT], out, batch_size=4, shard_images=8, dtype="float32")


def coder_for(store, architecture="topk", **arguments):
    coder = make_coder(architecture, d_in=24, d_sae=64, seed=1, **arguments)
    reader = store.reader(POINT, batch_size=10_000)
    coder.fit(store.stats(POINT, "all"), next(iter(reader)))
    return coder.eval()


def rows_of(store):
    return torch.cat([x for _, x in store.image_batches(POINT, "all")]).flatten(0, 1)


@pytest.mark.parametrize("normalization", ["mean_std", "layer_norm"])
def test_codes_are_the_coders_up_to_fp16(store, tmp_path, normalization):
    coder = coder_for(store, k=5, normalization=normalization)
    encoded = encode(coder, store, tmp_path / "codes")
    parts = [codes for _, codes in encoded.shards()]
    z = torch.cat([codes.to_dense() for codes in parts])
    expected = coder.encode(rows_of(store))
    assert z.shape == (20 * 17, 64)
    assert torch.equal(z > 0, expected > 0)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-6)
    # Row-wise normalisation travels with the codes: a reconstruction needs nothing else.
    x_hat = torch.cat([coder.decode_sparse(codes) for codes in parts])
    torch.testing.assert_close(x_hat, coder(rows_of(store)), rtol=2e-3, atol=2e-3)


def test_one_image_and_one_patch_map(store, tmp_path):
    coder = coder_for(store, k=5)
    encoded = encode(coder, store, tmp_path / "codes")
    z = coder.encode(rows_of(store)).reshape(20, 17, 64)
    for row in (0, 7, 8, 19):
        torch.testing.assert_close(encoded.image(row).to_dense(), z[row], rtol=1e-3, atol=1e-6)
    latent = int(z[9, 1:].sum(0).argmax())
    torch.testing.assert_close(encoded.patch_map(9, latent), z[9, 1:, latent].reshape(4, 4), rtol=1e-3, atol=1e-6)
    with pytest.raises(IndexError, match=r"image row must be in 0..19, got 20"):
        encoded.image(20)


def test_a_faint_activation_stays_active(store, tmp_path, monkeypatch):
    coder = coder_for(store, k=5)
    with torch.no_grad():
        coder.W_enc.mul_(1e-9)
    encoded = encode(coder, store, tmp_path / "codes")
    l0 = torch.cat([codes.l0() for _, codes in encoded.shards()])
    assert torch.equal(l0, coder.encode_sparse(rows_of(store)).l0())
    assert all(float(codes.values.min()) > 0 for _, codes in encoded.shards())


def test_an_activation_beyond_fp16_says_so(store, tmp_path):
    coder = coder_for(store, k=5)
    with torch.no_grad():
        coder.W_enc.mul_(1e8)
    with pytest.raises(ValueError, match="more than float16 can hold. Encode with dtype='float32'"):
        encode(coder, store, tmp_path / "codes")
    assert encode(coder, store, tmp_path / "codes32", dtype="float32").n_images == 20


def test_a_killed_encode_goes_on_to_the_same_bytes(store, tmp_path, monkeypatch):
    coder = coder_for(store, k=5)
    encode(coder, store, tmp_path / "whole")
    real, written = codes_module.write_tensors, []

    def dying(path, tensors):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        real(path, tensors)

    monkeypatch.setattr(codes_module, "write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        encode(coder, store, tmp_path / "cut")
    with pytest.raises(ValueError, match="unfinished. Run the same encode again"):
        CodeStore.open(tmp_path / "cut")
    monkeypatch.undo()
    encode(coder, store, tmp_path / "cut")
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_other_codes_and_other_widths_are_refused(store, tmp_path):
    encode(coder_for(store, k=5), store, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"holds other codes \(different coder_digest"):
        encode(coder_for(store, k=5, normalization="none"), store, tmp_path / "codes")
    wide = make_coder("topk", d_in=32, d_sae=64, k=5, normalization="none")
    with pytest.raises(ValueError, match=r"the coder takes d_in=32, but blocks.1.hook_resid_post of .* is 24 wide"):
        encode(wide, store, tmp_path / "other")


def test_the_saved_coder_says_where_it_belongs(store, tmp_path):
    coder = coder_for(store, k=5)
    save_coder(tmp_path / "coder", coder, {"point": POINT, "tokens": "spatial"})
    encoded = encode(coder, store, tmp_path / "codes", coder_path=tmp_path / "coder")
    assert (encoded.manifest.tokens, encoded.n_tokens) == ("spatial", 16)
    assert encoded.token_position(0) == 1  # the first patch comes after CLS
    z = coder.encode(rows_of(store)).reshape(20, 17, 64)[:, 1:]
    torch.testing.assert_close(encoded.image(3).to_dense(), z[3], rtol=1e-3, atol=1e-6)


def test_a_cut_shard_is_named(store, tmp_path):
    encode(coder_for(store, k=5), store, tmp_path / "codes")
    path = tmp_path / "codes/shards/shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is cut or missing"):
        CodeStore.open(tmp_path / "codes")


def test_codes_take_the_room_of_their_non_zeros(store, tmp_path):
    encoded = encode(coder_for(store, k=3), store, tmp_path / "codes")
    nnz = sum(shard.nnz for shard in encoded.manifest.shards)
    assert nnz <= 3 * 340
    size = sum(shard.bytes for shard in encoded.manifest.shards)
    assert size < 6 * nnz + 8 * 343 + 3 * 400  # 4 bytes of index, 2 of value; offsets; headers
    assert np.isfinite(size)


def test_a_shard_of_unreadable_images_has_no_rows(tmp_path):
    from vitrail.images.base import BadImage

    class FirstBad(type(open_images("world:shapes?n=12&image_px=32"))):
        def load(self, i):
            if i in bad:
                raise BadImage("cut")
            return super().load(i)

    torch.manual_seed(0)
    backbone = wrap(ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=2, n_heads=2, d_mlp=32, n_classes=5), name="t")
    bad = set(np.random.default_rng(0).permutation(12)[4:8].tolist())  # the second shard, whole
    store = extract(backbone, FirstBad(n=12, image_px=32), [POINT], tmp_path / "s", batch_size=4, shard_images=4)
    assert [shard.n_images for shard in store.manifest.shards] == [4, 0, 4]
    encoded = encode(coder_for(store, k=5), store, tmp_path / "codes")
    assert [codes.n for _, codes in encoded.shards()] == [68, 0, 68]
    assert encoded.image(7).n == 17
