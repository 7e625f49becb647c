"""The text side of dual encoders."""

import math

import pytest
import torch
from small_backbones import build_case, hugging_face

from vitrail import backbones
from vitrail.backbones import class_embeddings


class Letters:
    """'a...' points along x, 'b...' along y, anything else along the diagonal."""

    logit_scale = 100.0

    def encode(self, texts):
        rows = {"a": (1.0, 0.0), "b": (0.0, 1.0)}
        return torch.tensor([rows.get(text[0], (math.sqrt(0.5), math.sqrt(0.5))) for text in texts])


def test_class_embeddings_are_renormalised_means_of_unit_rows():
    # "cat" by templates "{}" and "a {}": (r, r) and (1, 0) with r = sqrt(1/2); their mean is (1 + r, r) / 2.
    found = class_embeddings(Letters(), ["cat", "bee"], templates=("{}", "a {}"))
    r = math.sqrt(0.5)
    expected = torch.tensor([[1 + r, r], [1.0, 1.0]])
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="'a photo'"):
        class_embeddings(Letters(), ["cat"], templates=("a photo",))


@pytest.mark.parametrize("name", ["open_clip", "open_clip-trunk"])
def test_open_clip_texts_are_unit_rows_of_its_own(name):
    import open_clip

    backbone = build_case(name).backbone
    assert backbone.text is not None
    texts = ["a photo of a cat.", "two dogs"]
    rows = backbone.text.encode(texts)
    ids = open_clip.SimpleTokenizer(context_length=8)(texts)
    torch.testing.assert_close(rows, backbone.module.encode_text(ids, normalize=True))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    assert backbone.text.logit_scale == pytest.approx(float(backbone.module.logit_scale.detach().exp()))
    assert rows.shape == (2, backbone.d_embed)


@pytest.mark.parametrize("architecture", ["CLIPModel", "SiglipModel"])
def test_hugging_face_texts_are_those_of_its_own_similarity(architecture, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", "cat", "dog", "red"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(tmp_path)
    model = hugging_face(architecture, lambda output: output)().backbone.module
    backbone = backbones.huggingface.wrap(model, name="hf/dual", tokenizer_source=str(tmp_path))
    assert backbone.text is not None
    rows = backbone.text.encode(["red cat", "dog"])
    images = torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[5, 3, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]])
    theirs = model(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(rows, theirs.text_embeds)
    cosines = torch.nn.functional.normalize(backbone(images), dim=1) @ rows.T
    bias = getattr(model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(cosines * backbone.text.logit_scale + bias, theirs.logits_per_image)


def test_no_tokenizer_is_a_sentence():
    case = hugging_face("CLIPModel", lambda output: output)()
    assert case.backbone.text is not None
    with pytest.raises(ConnectionError, match="tokenizer of hf/CLIPModel is not on this machine"):
        case.backbone.text.encode(["cat"])
    away = backbones.huggingface.wrap(case.backbone.module, name="hf/away", tokenizer_source="nobody/nothing-at-all")
    assert away.text is not None
    with pytest.raises(ConnectionError, match="tokenizer of hf/away"):
        away.text.encode(["cat"])


def test_image_only_models_have_no_text():
    for name in ("toy", "timm-vit", "hf-clip-projected"):
        assert build_case(name).backbone.text is None


def test_a_toy_clip_reads_words_of_its_own():
    backbone = build_case("toy-clip").backbone
    assert backbone.text is not None
    rows = backbone.text.encode(["a photo of a red cat.", "dog", "A  Dog!"])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert rows.shape == (3, backbone.d_embed)
    # Words a, cat, dog, of, photo, red are 3 ... 8, after padding 0, start 1 and end 2.
    ids = backbone.module.tokenizer(["a red dog", "Dog."])
    assert ids.tolist() == [[1, 3, 8, 5, 2, 0, 0, 0], [1, 5, 2, 0, 0, 0, 0, 0]]
    # A text's row does not move with the texts beside it, nor with the padding they bring.
    torch.testing.assert_close(backbone.text.encode(["dog"])[0], rows[1])
    assert not torch.allclose(rows[1], rows[2])
    with pytest.raises(ValueError, match=r"knows 6 words, and 'rat' is none of them\. Nearest: cat"):
        backbone.text.encode(["a rat"])
    with pytest.raises(ValueError, match="a text may have 6 words, got 7"):
        backbone.text.encode(["a a a a a a a"])


def test_the_text_tower_of_a_toy_reads_forward_only():
    """A token sees itself and what is before it: the end token sees all, the first words nothing of the last."""
    text = build_case("toy-clip").backbone.module.text
    ids = torch.tensor([[1, 3, 8, 5, 2], [1, 3, 8, 4, 2]])
    x = text.token_embed(ids) + text.pos_embed[:5]
    for block in text.blocks:
        x = block(x)
    assert torch.equal(x[0, :3], x[1, :3])
    assert not torch.allclose(x[0, 4], x[1, 4])
