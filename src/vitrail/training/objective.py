"""The gradient of one batch, made in micro-batches.

    loss = step.loss - (1 - f) * (the terms that step.penalty names) + the reviver's term
    gradient of the batch = sum over micro-batches of (rows of it / rows of the batch) * its gradient

f rises from 0 to 1 while the penalty warms up. Where the loss is a mean over rows that do not see each other, the sum
is the whole batch's gradient. Three things are taken per micro-batch instead of per batch: BatchTopK's n*k largest
entries (its "batch" is a micro-batch), auxk's and ghost's factors, which are ratios of means.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step
from vitrail.coders.sparse import Codes
from vitrail.training.revive import Reviver


def backward(
    coder: SparseCoder,
    x: Float[Tensor, "n d_row"],
    *,
    dead: Bool[Tensor, " d_sae"],
    reviver: Reviver,
    revival: str,
    penalty_factor: float = 1.0,
    accumulate: int = 1,
    check_loss: Callable[[Tensor], None] | None = None,
) -> Step:
    """Add the batch's gradient to the parameters'. Returns the batch's step as trained, without graph.

    The reviver's term is among its terms, under the name `revival`. `check_loss` sees each loss before its backward
    pass and may raise.
    """
    parts, shares = [], []
    for rows in x.chunk(accumulate):
        step = coder.loss(rows)
        phase_in(step, penalty_factor)
        term = reviver.term(coder, step, dead)
        step.loss, step.terms = step.loss + term, {**step.terms, revival: term}
        if check_loss is not None:
            check_loss(step.loss)
        shares.append(len(rows) / len(x))
        (step.loss * shares[-1]).backward()
        let_graph_go(step)
        parts.append(step)
    return parts[0] if len(parts) == 1 else joined(parts, shares)


def phase_in(step: Step, factor: float) -> None:
    """Bring the terms that buy sparsity to `factor` of their weight."""
    if factor == 1 or not step.penalty:
        return
    penalties = torch.stack([step.terms[name] for name in step.penalty]).sum()
    step.loss = step.loss - (1 - factor) * penalties
    step.terms = {name: term * factor if name in step.penalty else term for name, term in step.terms.items()}


def let_graph_go(step: Step) -> None:
    step.loss, step.terms = step.loss.detach(), {name: term.detach() for name, term in step.terms.items()}
    step.y, step.target, step.x_hat = step.y.detach(), step.target.detach(), step.x_hat.detach()


def joined(parts: Sequence[Step], shares: Sequence[float]) -> Step:
    """The step of all rows, from those of its micro-batches."""
    return Step(
        _weighted([part.loss for part in parts], shares),
        {name: _weighted([part.terms[name] for part in parts], shares) for name in parts[0].terms},
        lambda: Codes.cat([part.codes for part in parts]),
        y=torch.cat([part.y for part in parts]),
        target=torch.cat([part.target for part in parts]),
        x_hat=torch.cat([part.x_hat for part in parts]),
        penalty=parts[0].penalty,
        fired=torch.stack([part.fired() for part in parts]).sum(0),
    )


def _weighted(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()
