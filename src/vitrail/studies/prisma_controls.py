"""The controls that stand beside a coder of any kind in Prisma's table, and a backbone that has learnt nothing.

    SAE          random, pca, pca_all, neurons, untrained of coders/baselines.py, and kmeans
    transcoder   the same codes of what it reads; what it writes is the best linear map (ridge) of what those codes keep
                 of their input. Where the transcoder has a skip, so have they: the best linear map, and the codes
                 explain what that leaves
    crosscoder   the same on rows in which each source has its own mean and scale, as the crosscoder has them

k-means has at most KMEANS_CENTROIDS centroids of at most KMEANS_ROWS rows, so that it takes seconds and not hours: it
is a smaller dictionary than the coder's.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.baselines import KMeans, controls, untrained_like
from vitrail.coders.crosscoder import MultiSource
from vitrail.coders.topk import TopK
from vitrail.coders.transcoder import TopKTranscoder, Transcoder
from vitrail.files import tensors_digest
from vitrail.statistics import ActivationStats

KMEANS_ROWS, KMEANS_CENTROIDS, KMEANS_ITERATIONS = 4096, 512, 10
RIDGE = 1e-6  # of the mean variance


def controls_of(
    coder: SparseCoder, sample: Float[Tensor, "n d_row"], *, k: int
) -> tuple[dict[str, SparseCoder], dict[str, float]]:
    """Controls by name, and the seconds that fitting them took. `sample`: rows as the coder's `fit` takes them."""
    if sample.shape[1] != coder.d_row:
        raise ValueError(
            f"the controls of a {coder.name} coder are fitted on rows of {coder.d_row} values, all that it reads and "
            f"writes side by side; the sample has {sample.shape[1]}."
        )
    began = time.perf_counter()
    x, standing_for = sample, coder
    if isinstance(coder, Transcoder):
        x, _ = coder.split(sample)
        standing_for = _reader(coder, x)
    elif isinstance(coder, MultiSource):
        x = coder.normalized(sample)
        standing_for = TopK(d_in=coder.d_in, d_sae=coder.d_sae, k=k, normalization="none", seed=coder.seed).to(x)
    found = controls(standing_for, x, k=k)
    untrained = found.pop("untrained")
    others = time.perf_counter() - began
    found["kmeans"] = kmeans(standing_for, x, k=k)
    seconds = {"kmeans": time.perf_counter() - began - others, "others": others}
    if isinstance(coder, Transcoder):
        found = {name: _writing(coder, control, sample) for name, control in found.items()}
    elif isinstance(coder, MultiSource):
        found = {name: _by_source(coder, control) for name, control in found.items()}
    if standing_for is not coder:
        untrained = _untrained(coder, sample)
    found["untrained"] = untrained
    return found, {name: round(value, 3) for name, value in seconds.items()}


@torch.no_grad()
def kmeans(coder: SparseCoder, sample: Float[Tensor, "n d_in"], *, k: int) -> SparseCoder:
    """As many centroids as the coder has latents, the limits allow, and the sample has different rows."""
    sample = sample[:KMEANS_ROWS]
    n_different = len(torch.unique(sample, dim=0))
    n_centroids = max(1, min(coder.d_sae, KMEANS_CENTROIDS, n_different))
    fitted = KMeans(
        d_in=coder.d_in,
        d_sae=n_centroids,
        k=min(k, n_centroids),
        n_iterations=KMEANS_ITERATIONS,
        normalization=coder.normalization,
        seed=coder.seed,
    ).to(coder.W_dec)
    fitted.fit(ActivationStats.of(sample), sample)
    return fitted.eval()


def _reader(coder: Transcoder, x: Float[Tensor, "n d_in"]) -> SparseCoder:
    """An SAE of what a transcoder reads, of its size: what `controls` looks at."""
    reader = TopK(d_in=coder.d_in, d_sae=coder.d_sae, normalization=coder.normalization, seed=coder.seed)
    reader = reader.to(coder.W_dec)
    reader.fit(ActivationStats.of(x), x)
    return reader


@torch.no_grad()
def _writing(coder: Transcoder, control: SparseCoder, sample: Float[Tensor, "n d_row"]) -> SparseCoder:
    """A TopK transcoder with a control's codes: W_dec is the control's, mapped to the target by least squares."""
    assert isinstance(control, TopK)
    skip = coder.W_skip is not None
    writer = TopKTranscoder(
        d_in=coder.d_in,
        d_out=coder.d_out,
        d_sae=control.d_sae,
        k=control.k,
        skip=skip,
        normalization=coder.normalization,
        output_normalization=coder.output_normalization,
        seed=control.seed,
    ).to(coder.W_dec)
    writer.fit(ActivationStats.of(sample), sample)
    writer.normalize.load_state_dict(control.normalize.state_dict())
    for name in ("W_enc", "b_enc", "b_dec"):
        getattr(writer, name).copy_(getattr(control, name))
    y, target = writer.normalized_pair(sample)
    bias = y.new_zeros(coder.d_out)
    if writer.W_skip is not None:
        linear, bias = ridge(y, target)
        writer.W_skip.copy_(linear)
        target = target - y @ linear - bias
    x, _ = writer.split(sample)
    kept = control.normalize(control(x)).y - control.b_dec  # z @ W_dec
    onto, offset = ridge(kept, target)
    writer.W_dec.copy_(control.W_dec @ onto)
    writer.b_out.copy_(bias + offset)
    return writer.eval()


def ridge(
    y: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """(A, b) of the least squares of y @ A + b to the target, with a little weight against large A."""
    y64, target64 = y.double(), target.double()
    y_mean, target_mean = y64.mean(0), target64.mean(0)
    centred = y64 - y_mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    A = torch.linalg.solve(gram, centred.T @ (target64 - target_mean))
    return A.to(y), (target_mean - y_mean @ A).to(y)


def _by_source(coder: MultiSource, control: SparseCoder) -> SparseCoder:
    """A control that was fitted in the crosscoder's normalised space, with the crosscoder's normalisation before it."""
    control.normalize = copy.deepcopy(coder.normalize)
    control.normalization = coder.normalization
    return control.eval()


def _untrained(coder: SparseCoder, sample: Float[Tensor, "n d_row"]) -> SparseCoder:
    untrained = untrained_like(coder, sample)
    if isinstance(coder, Transcoder) and isinstance(untrained, Transcoder):
        untrained.normalize_out.load_state_dict(coder.normalize_out.state_dict())
    return untrained


@dataclass(frozen=True)
class RandomWeights:
    """Weights for a backbone as if it had never been trained, by the names of its module's parameters and buffers.

    `how`: "reset_parameters" where a module can draw its weights anew as PyTorch does (linear layers, convolutions,
    norms); "permuted" for the other parameters (class token, positions, layer scales): their own values in another
    order, so that mean and spread stay.
    """

    weights: dict[str, Tensor]
    how: dict[str, str]
    seed: int

    @classmethod
    def of(cls, backbone: Backbone, *, seed: int) -> "RandomWeights":
        module = copy.deepcopy(backbone.module).cpu()
        how: dict[str, str] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for prefix, part in module.named_modules():
                reset: Any = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
                if callable(reset):
                    reset()
                    own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
                    how |= {f"{prefix}.{name}".lstrip("."): "reset_parameters" for name, _ in own}
            for name, parameter in module.named_parameters():
                if name not in how:
                    values = parameter.flatten()[torch.randperm(parameter.numel())]
                    parameter.copy_(values.reshape(parameter.shape))
                    how[name] = "permuted"
        device = next(backbone.module.parameters()).device
        weights = {name: tensor.detach().to(device) for name, tensor in _tensors(module).items() if name in how}
        return cls(weights=weights, how=how, seed=seed)

    @contextmanager
    def within(self, backbone: Backbone) -> Iterator[Backbone]:
        """While open, the backbone has these weights, and a digest of its own. They change places by reference:
        nothing is copied.
        """
        own = _tensors(backbone.module)
        kept = {name: own[name].data for name in self.weights}
        digest = vars(backbone).pop("digest", None)  # kept by cached_property, once it was asked for
        try:
            for name, value in self.weights.items():
                own[name].data = value
            yield backbone
        finally:
            for name, value in kept.items():
                own[name].data = value
            vars(backbone).pop("digest", None)
            if digest is not None:
                vars(backbone)["digest"] = digest

    def to_json(self) -> dict[str, Any]:
        counts = {way: sum(found == way for found in self.how.values()) for way in sorted(set(self.how.values()))}
        return {
            "how": "+".join(counts),
            "tensors": counts,
            "seed": self.seed,
            "digest": tensors_digest(self.weights),
        }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
