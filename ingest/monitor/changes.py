"""What every image changed: AdamW's updates shared among the images of its batches, and what they did to K and V of a prompt.

    M_i(s)      = beta1 M_i(s-1) + (1 - beta1) SUM over the slots b of image i of g_b(s)
    dtheta_i(s) = - lr M_i(s) / (1 - beta1^(s+1)) / (sqrt(v(s) / (1 - beta2^(s+1))) + eps)      v: Adam's own
    decay(s)    = - lr weight_decay theta(s)

Together they are theta(s+1) - theta(s). R_c = S_c W^T are K and V of concept c's prompt, whose states S_c change where the
token is trained. A step changes them by

    S_c(s) (theta(s+1) - theta(s))^T + (S_c(s+1) - S_c(s)) theta(s+1)^T

of which the first part is shared by `dtheta_i`. The second is the token's. It is shared in proportion to how far each image
moved the token's embedding along its way where the token alone is trained; beside weights it is hardly anything (0.3 % of the
change at icon-sd), and is no image's. What is left over, in rounding and of images that were let go of, is the `rest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.prompt_states import PromptStates
from attrdb.ingest.monitor.slot_gradients import SlotGradients

QUARTERS = 4
MEMORY = 2**30  # bytes that the images' momentum may take; images that were not drawn for long are let go of
MAX_SUMMED = 64  # images of which the sum of all gradients is kept

WEIGHTS, TOKEN, REGULARIZATION, DECAY, REST = CAUSES = ("weights", "token", "regularization", "decay", "rest")


@dataclass(frozen=True)
class Change:
    """What one cause did to K and V of a concept's prompt in a quarter of the steps, from 1.

    image:    index of the exemplar; None for causes that are no exemplar's
    n_visits: slots that drew the exemplar; None without one
    norm:     sum over steps of the length of the change; None for the token's and the rest
    progress: <change, D> / |D|^2, D the change of the whole training: over all rows of a concept it adds up to 1
    """

    concept: int
    quarter: int
    cause: str
    image: int | None
    n_visits: int | None
    norm: float | None
    progress: float


class Changes:
    """Books the changes of a run, step by step.

    What is booked has a row for each exemplar, then one for all regularization images, one for the decay of weights, and one
    for what is nobody's.

    prompts: of each concept, one or more
    raises:  InvalidValue, as `SlotGradients`
    """

    def __init__(self, run: Run, prompts: Sequence[Sequence[str]]):
        self.run = run
        self.gradients = SlotGradients(run)
        self.adam = run.optimizer_settings
        self.momentum = Momentum(run, self.gradients.watched)
        self.sums: Tensors | None = None
        if run.n_exemplars <= MAX_SUMMED:
            self.sums = {name: _zeros(run.n_exemplars, weight) for name, weight in self.gradients.watched.items()}
        self.prior, self.decay, self.nobody = (run.n_exemplars + number for number in range(3))
        n_rows = self.nobody + 1
        self.n_visits = torch.zeros(QUARTERS, n_rows, dtype=torch.int64)
        self.prompt_states = PromptStates(run, prompts)
        self.states = self.prompt_states.now()
        self.start = [self._projected(states) for states in self.states]
        self.at_ends: dict[int, list[torch.Tensor]] = {}  # of each quarter that was trained, K and V of each concept
        device = run.base.device
        self.by_weights = [torch.zeros(QUARTERS, n_rows, *start.shape, device=device) for start in self.start]
        self.by_token = [torch.zeros_like(of_concept) for of_concept in self.by_weights]
        self.norms = torch.zeros(len(prompts), QUARTERS, n_rows, device=device)
        # Of the last step's change of each concept's token.
        self.token_shares = torch.eye(n_rows, device=device)[self.nobody].repeat(len(prompts), 1)
        self.token_of = [_token_in(of_concept, self.gradients.tokens) for of_concept in prompts]

    def close(self) -> None:
        self.gradients.remove()
        self.prompt_states.remove()

    def before_update(self, step: Step) -> torch.Tensor:
        """Book the step's gradients, and what the step before did to the token; (n_slots,) float32, the gradients' norms."""
        if step.number:
            self._end_step(step.number - 1)
        slots = self.gradients.take(step)
        rows = torch.where(step.is_exemplar, step.images, self.prior)
        self.n_visits[self._quarter(step.number)] += torch.bincount(rows, minlength=self.nobody + 1)
        self.momentum.add(slots, rows, self.adam["betas"][0])
        if self.sums is not None:
            n_exemplars = int(step.is_exemplar.sum())  # the first slots
            images = step.images[:n_exemplars].to(self.run.base.device)
            for name, of_slots in slots.items():
                self.sums[name].index_add_(0, images, of_slots[:n_exemplars])
        self.before = self.run.weights()
        return torch.stack([of_slots.flatten(1).norm(dim=1) for of_slots in slots.values()]).norm(dim=0)

    def after_update(self, step: Step) -> None:
        """Book what the update did to the weights."""
        self.prompt_states.forget()
        updates, rows = self._updates(step.number)
        quarter = self._quarter(step.number)
        for concept, states in enumerate(self.states):
            parts = [projection.change(states, updates, self.before) for projection in self.gradients.of_prompts]
            changed = torch.cat(parts, dim=-1)
            self.by_weights[concept][quarter, rows] += changed
            self.norms[concept, quarter, rows] += changed.flatten(1).norm(dim=1)
        if self.gradients.watches_tokens:
            self.token_shares.zero_()
            for concept, key in enumerate(self.token_of):
                self.token_shares[concept, rows] = _shares(updates[key])

    def finish(self) -> None:
        """After the last step: book what it did to the token."""
        self._end_step(self.run.settings.steps - 1)

    def _end_step(self, number: int) -> None:
        """Book what a step did to the token, which shows in the states of the prompts after it."""
        quarter, states = self._quarter(number), self.prompt_states.now()
        if self.gradients.tokens:
            for booked, shares, before, after in zip(
                self.by_token, self.token_shares, self.states, states, strict=True
            ):
                booked[quarter] += shares[:, None, None] * self._projected(after - before)
            self.states = states
        if number + 1 == self.run.settings.steps or self._quarter(number + 1) != quarter:
            self.at_ends[quarter] = [self._projected(of_concept) for of_concept in states]

    def rows(self) -> Iterator[Change]:
        """The booked changes of the whole run, after `finish`."""
        for concept, before in enumerate(self.start):
            whole = self.at_ends[max(self.at_ends)][concept] - before
            direction = whole / whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
            for quarter, at_ends in sorted(self.at_ends.items()):
                booked = [of_cause[concept][quarter] for of_cause in (self.by_weights, self.by_token)]
                rest = at_ends[concept] - before - sum(of_cause.sum(dim=0) for of_cause in booked)
                before = at_ends[concept]
                by_weights, by_token = ((of_cause * direction).sum(dim=(1, 2)).tolist() for of_cause in booked)
                norms, visits = self.norms[concept, quarter].tolist(), self.n_visits[quarter].tolist()
                in_quarter = partial(Change, concept, quarter + 1)
                for image in range(self.run.n_exemplars):
                    if self.gradients.watches_tokens:
                        yield in_quarter(TOKEN, image, visits[image], None, by_token[image])
                    else:
                        yield in_quarter(WEIGHTS, image, visits[image], norms[image], by_weights[image])
                if self.run.prior_prompts:
                    yield in_quarter(REGULARIZATION, None, None, norms[self.prior], by_weights[self.prior])
                if self.gradients.tokens and not self.gradients.watches_tokens:
                    yield in_quarter(TOKEN, None, None, None, by_token[self.nobody])
                decayed = by_weights[self.decay] + by_token[self.decay]
                yield in_quarter(DECAY, None, None, norms[self.decay], decayed)
                yield in_quarter(REST, None, None, None, (rest * direction).sum().item())

    def _quarter(self, number: int) -> int:
        """Of a step; both from 0."""
        return number * QUARTERS // self.run.settings.steps

    def _projected(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens, widths of all K and V)."""
        return torch.cat([projection.project(states) for projection in self.gradients.of_prompts], dim=-1)

    def _updates(self, number: int) -> tuple[Tensors, torch.Tensor]:
        """What a step did to the weights, (n, *shape) by parameter, and the rows that these n are booked in."""
        (beta1, beta2), lr, eps, decay = (self.adam[name] for name in ("betas", "lr", "eps", "weight_decay"))
        moments = self.run.moments()
        updates = {}
        for name, momentum in self.momentum.of_images.items():
            if name not in moments:
                continue  # the loss does not depend on it, and Adam leaves it as it is
            spread = (moments[name][1] / (1 - beta2 ** (number + 1))).sqrt_().add_(eps)
            scale = spread.reciprocal_().mul_(-lr / (1 - beta1 ** (number + 1)))
            update = momentum.new_empty(len(momentum) + 1, *momentum.shape[1:])
            torch.mul(momentum, scale, out=update[:-1])
            torch.mul(self.before[name], -lr * decay, out=update[-1])
            updates[name] = update
        return updates, torch.tensor([*self.momentum.rows, self.decay], device=self.run.base.device)


class Momentum:
    """Adam's running mean of the gradient, shared among images: of as many images as there is memory for.

    weights:   what is watched, by parameter
    of_images: (n, *shape) float32 by parameter
    rows:      of these n
    """

    def __init__(self, run: Run, weights: Tensors):
        n_weights = sum(weight.numel() for weight in weights.values())
        fits = max(2 * run.settings.batch, MEMORY // (4 * n_weights))
        self.n_images, self.n_steps = min(run.n_exemplars, fits), 0
        self.rows = [*range(self.n_images), *[run.n_exemplars] * bool(run.prior_prompts)]
        self.last_drawn = [-1] * len(self.rows)
        self.of_images = {name: _zeros(len(self.rows), weight) for name, weight in weights.items()}

    def add(self, slots: Tensors, rows: torch.Tensor, beta: float) -> None:
        """Add the gradients of a step's slots, each to the row of its image."""
        drawn = rows.tolist()
        places = torch.tensor([self._place(row, set(drawn)) for row in drawn])
        for name, momentum in self.of_images.items():
            momentum.mul_(beta)
            if name in slots:
                momentum.index_add_(0, places.to(momentum.device), slots[name], alpha=1 - beta)
        self.n_steps += 1

    def _place(self, row: int, drawn: set[int]) -> int:
        """Where the row is; one that is not there takes the place of the image that was not drawn for longest."""
        if row not in self.rows:
            others = [place for place in range(self.n_images) if self.rows[place] not in drawn]
            place = min(others, key=lambda place: self.last_drawn[place])
            self.rows[place] = row
            for momentum in self.of_images.values():
                momentum[place] = 0
        place = self.rows.index(row)
        self.last_drawn[place] = self.n_steps
        return place


def _token_in(prompts: Sequence[str], tokens: Mapping[str, str]) -> str:
    """The parameter of the first token that the prompts name; empty without one."""
    return next((key for token, key in tokens.items() if any(token in prompt for prompt in prompts)), "")


def _zeros(n: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(n, *weight.shape, device=weight.device)


def _shares(updates: torch.Tensor) -> torch.Tensor:
    """(n,): of n updates (n, width), their parts along the sum of all, which add up to 1."""
    whole = updates.sum(dim=0)
    return updates @ whole / whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
