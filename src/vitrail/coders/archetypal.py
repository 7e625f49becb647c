"""Archetypal coders: the architectures of topk.py and batch_topk.py with a decoder made of data (dictionary.py).

    V = softmax(mixing) @ candidates + relaxation,   ||relaxation_i|| <= delta,   W_dec_i = V_i / ||V_i||

Fel et al. 2025, arXiv:2502.12892. The encoder is free. Candidates are k-means centres of the rows given to `fit`
("kmeans") or some of these rows ("subsample"). `delta` is a length in the normalised space, where rows have norm
sqrt(d_in) under "mean_std"; 0 keeps directions strictly in the data's cone. Another architecture is another such class:
the mixin first, and `constrain_to_data` at the end of its constructor.
"""

from vitrail.coders.batch_topk import BatchTopK
from vitrail.coders.dictionary import Archetypal
from vitrail.coders.topk import TopK


class ArchetypalTopK(Archetypal, TopK):
    name = "archetypal_topk"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        n_candidates: int = 1024,
        candidates_from: str = "kmeans",
        delta: float = 1.0,
        inference: str = "topk",
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            inference=inference,
            normalization=normalization,
            b_dec_init=b_dec_init,
            seed=seed,
        )
        self.constrain_to_data(n_candidates=n_candidates, candidates_from=candidates_from, delta=delta)


class ArchetypalBatchTopK(Archetypal, BatchTopK):
    name = "archetypal_batch_topk"

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int = 32,
        n_candidates: int = 1024,
        candidates_from: str = "kmeans",
        delta: float = 1.0,
        normalization: str = "mean_std",
        b_dec_init: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, k=k, normalization=normalization, b_dec_init=b_dec_init, seed=seed)
        self.constrain_to_data(n_candidates=n_candidates, candidates_from=candidates_from, delta=delta)
