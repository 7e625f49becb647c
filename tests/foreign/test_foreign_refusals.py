"""What is not opened, and the sentence it gets; pickles that would run code do not."""

import os
import pickle
import subprocess

import pytest
import torch
from foreign_examples import (
    D_IN,
    D_SAE,
    linear,
    of_visaebench,
    plain,
    random_tensors,
    rows,
    write_dictionary_learning,
    write_msae,
    write_prisma,
    write_prisma_legacy,
    write_saelens,
    write_saev,
    write_sparsify,
    write_visaebench,
)

from vitrail.cli import main
from vitrail.coders import coder_metadata, load_coder
from vitrail.foreign import PEERS, open_foreign, read_foreign, recognise
from vitrail.foreign.pickles import attributes, read_pickle
from vitrail.statistics import ActivationStats
from vitrail.store import Store

MARK = "ran"


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function, *arguments):
        self.said = function, arguments

    def __reduce__(self):
        return self.said


class Keeps:
    """Pickles to attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize("call", ["os.system", "eval", "check_call", "own class", "makedirs in a class's state"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, call):
    mark = tmp_path / MARK
    evil = {
        "os.system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(eval, f"__import__('os').mkdir({str(mark)!r})"),
        "check_call": Calls(subprocess.check_call, ["touch", str(mark)]),
        "own class": Calls(Keeps, 1),
        "makedirs in a class's state": Keeps(inner=Calls(os.makedirs, str(mark))),
    }[call]
    path = tmp_path / "sae.pt"
    torch.save({"cfg": evil, "state_dict": plain()}, path)
    for act in (lambda: read_pickle(path), lambda: recognise(path), lambda: open_foreign(path, "prisma")):
        with pytest.raises(ValueError, match="A pickle can run code when it is opened, so this one is not"):
            act()
    assert not mark.exists()
    if call != "own class":  # it would have run
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_unknown_classes_become_bags_of_attributes(tmp_path):
    torch.save(
        Keeps(k=3, dtype=torch.float32, inner=Keeps(device=torch.device("cpu"), wide=[1.5, None])), tmp_path / "x.pt"
    )
    read = read_pickle(tmp_path / "x.pt")
    assert not isinstance(read, Keeps)
    assert read.k == 3
    told = attributes(read)
    assert told["class"].endswith("Keeps")
    assert (told["dtype"], told["inner"]["device"], told["inner"]["wide"]) == ("torch.float32", "cpu", [1.5, None])


def test_old_and_cut_pickles_are_refused(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a file of torch.save"):
        read_pickle(tmp_path / "old.pt")
    torch.save(plain(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut short"):
        read_pickle(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        read_pickle(tmp_path / "none.pt")


def visaebench(tmp_path, config, **more):
    weights = plain()
    return write_visaebench(tmp_path, {**of_visaebench(weights), **more}, config)


def saev(tmp_path, header, **more):
    return write_saev(tmp_path / "sae.pt", {**plain(), **more}, header)


SAEV_TOPK = {"d_model": D_IN, "activation": {"cls": "TopK", "params": {"top_k": 3}}}
SKIP = random_tensors(W_skip=(D_IN, D_IN), b_dec_out=(D_IN,))


def msae(tmp_path, said, mean=None, d_sae=D_SAE):
    name = f"{d_sae}_{D_IN}_{said}_0.0_x.pth"
    return write_msae(tmp_path, name, plain(), torch.zeros(D_IN) if mean is None else mean, 1.0)


def saelens_skip(tmp_path):
    config = {"architecture": "skip_transcoder", "normalize_activations": "layer_norm"}
    return write_saelens(tmp_path, {**plain(), "W_skip": torch.ones(D_IN, D_IN)}, **config)


def sparsify_skip(tmp_path):
    return write_sparsify(tmp_path, plain() | random_tensors(W_skip=(D_IN, D_IN)), skip_connection=True)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: write_saelens(p, plain(), architecture="temporal"), "'temporal' has no counterpart"),
        (lambda p: write_saelens(p, plain(), normalize_activations="expected_average_only_in"), "Fold them in"),
        (lambda p: write_saelens(p, {**plain(), "scaling_factor": torch.full((D_SAE,), 2.0)}), "no longer applies"),
        (lambda p: write_saelens(p, {**plain(), "mystery": torch.ones(1)}), "does not know.*mystery"),
        (lambda p: write_saelens(p, plain(), metadata=None, activation_fn="tanh-relu"), "'tanh-relu'"),
        (lambda p: write_saelens(p, plain(), architecture="topk"), "k must be a positive whole number"),
        (saelens_skip, "would differ"),
        (lambda p: write_sparsify(p, plain(), activation="groupmax"), "'groupmax'"),
        (lambda p: write_sparsify(p, plain(), signed=True), "may be negative"),
        (sparsify_skip, "copies its input"),
        (lambda p: write_dictionary_learning(p, "CrossCoder", linear(plain())), "dict_class is 'CrossCoder'"),
        (lambda p: write_dictionary_learning(p, "AutoEncoder", linear(plain())), "lacks bias"),
        (lambda p: write_prisma(p, plain(), architecture="jumprelu"), "'jumprelu'"),
        (lambda p: write_prisma(p, plain(), activation_fn_str="tanh-relu"), "'tanh-relu'"),
        (lambda p: write_prisma(p, plain() | SKIP, is_transcoder=True), "skip connection reads raw"),
        (lambda p: msae(p, "TopK_3_False_False"), "negative"),
        (lambda p: msae(p, "ReLU_3_False_True"), "each row"),
        (lambda p: msae(p, "ReLU_3_False_False", d_sae=99), "renamed"),
        (lambda p: msae(p, "ReLU_3_False_False", torch.zeros(2)), "mean_center"),
        (lambda p: visaebench(p, {"sae_type": "batchtopk", "k": 3}), "has no threshold"),
        (lambda p: visaebench(p, {"sae_type": "jumprelu"}, thresholds=torch.ones(D_SAE)), "exponential"),
        (lambda p: visaebench(p, {"sae_type": "gelu"}), "'gelu'"),
        (lambda p: saev(p, {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D_IN}}), "does not. Open it with the saev"),
        (lambda p: saev(p, {"schema": 9, "cfg": {"d_vit": D_IN}}), "schema 9"),
        (lambda p: saev(p, {"schema": 2, "cfg": SAEV_TOPK}), "keeps negative values"),
        (lambda p: saev(p, {"hello": 1}), "no d_vit or d_model"),
        (lambda p: write_saelens(p, {**plain(), "b_dec": torch.full((D_IN,), float("nan"))}), "not finite"),
        (lambda p: write_saelens(p, {**plain(), "b_enc": torch.ones(2)}), "b_enc has shape"),
    ],
)  # fmt: skip
def test_what_would_not_be_the_authors_numbers_is_refused(tmp_path, write, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_foreign(write(tmp_path))


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="none of the formats"):
        open_foreign(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        open_foreign(tmp_path / "none")
    with pytest.raises(ValueError, match=f"no peer 'sealens'. Known: {', '.join(PEERS)}"):
        open_foreign(tmp_path, "sealens")
    with pytest.raises(ValueError, match="not a name that MSAE gives"):
        open_foreign(write_msae(tmp_path, "renamed.pth", plain(), torch.zeros(D_IN), 1.0), "msae")


def test_statistics_only_where_the_file_has_none(tmp_path):
    stats = ActivationStats.of(rows())
    with pytest.raises(ValueError, match="takes no statistics"):
        open_foreign(write_sparsify(tmp_path, plain()), stats=stats)
    path = visaebench(tmp_path / "v", {"sae_type": "topk", "k": 3})
    with pytest.raises(ValueError, match="of 3 dimensions; this coder has d_in=5"):
        open_foreign(path, stats=ActivationStats.of(rows()[:, :3]))


def test_a_legacy_file_beside_others_must_be_named(tmp_path):
    path = write_prisma_legacy(tmp_path / "n_images_1.pt", plain())
    assert read_foreign(tmp_path)[0].name == "prisma"  # one .pt
    write_prisma_legacy(tmp_path / "n_images_2.pt", plain())
    with pytest.raises(ValueError, match="none of the formats"):
        open_foreign(tmp_path)
    assert open_foreign(path).d_in == D_IN


# -- the verb


def test_convert_writes_a_coder_that_remembers_its_origin(tmp_path, capsys):
    path = write_prisma(tmp_path / "theirs", plain(), cls_token_only=True)
    main(["convert", str(path), str(tmp_path / "ours"), "--backbone", "open_clip/x", "--tokens", "cls"])
    told = capsys.readouterr().out
    assert "relu, 5 -> 9, normalisation layer_norm; from prisma" in told
    assert "note: trained on the CLS token only" in told
    torch.testing.assert_close(load_coder(tmp_path / "ours")(rows()), open_foreign(path)(rows()), rtol=0, atol=0)
    about = coder_metadata(tmp_path / "ours")
    assert (about["point"], about["tokens"], about["backbone"]) == ("blocks.9.hook_resid_post", "cls", "open_clip/x")
    assert about["origin"]["peer"] == "prisma"
    assert set(about["origin"]["sha256"]) == {"config.json", "weights.pt"}
    assert about["origin"]["config"]["model_name"] == "open-clip:laion/CLIP"
    main(["convert", str(path), str(tmp_path / "ours")])  # again: the same origin
    other = write_sparsify(tmp_path, plain())
    with pytest.raises(SystemExit):
        main(["convert", str(other), str(tmp_path / "ours")])
    assert "already holds another coder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="vitrail coder already"):
        recognise(tmp_path / "ours")


def test_convert_takes_place_and_statistics_from_a_store(tmp_path, capsys):
    common = ["--backbone", "toy/shapes", "--points", "blocks.1.hook_resid_post", "--workers", "0", "--device", "cpu"]
    main(["extract", "world:shapes?n=8", str(tmp_path / "store"), *common])
    store = Store.open(tmp_path / "store")
    d_in = len(store.stats("blocks.1.hook_resid_post", store.kind("blocks.1.hook_resid_post", None)).mean)
    t = random_tensors(W=(D_SAE, d_in), b=(D_SAE,), D=(D_SAE, d_in))
    tensors = {"encoder.weight": t["W"], "encoder.bias": t["b"], "decoder.weight": t["D"]}
    path = write_visaebench(tmp_path / "theirs", tensors, {"sae_type": "topk", "k": 3})
    main(["convert", str(path), str(tmp_path / "ours"), "--store", str(tmp_path / "store")])
    coder, about = load_coder(tmp_path / "ours"), coder_metadata(tmp_path / "ours")
    assert coder.normalization == "mean_std"
    assert (about["backbone"], about["store_digest"]) == ("toy/shapes", store.digest)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(
            ["convert", str(write_sparsify(tmp_path, plain())), str(tmp_path / "x"), "--store", str(tmp_path / "store")]
        )
    assert f"activations of {d_in} dimensions" in capsys.readouterr().err
