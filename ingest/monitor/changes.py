"""What every image changed: AdamW's updates shared among the images of its batches, and what they did to K and V of a prompt.

    M_i(s)      = beta1 M_i(s-1) + (1 - beta1) SUM over the slots b of image i of g_b(s)
    dtheta_i(s) = - lr M_i(s) / (1 - beta1^(s+1)) / (sqrt(v(s) / (1 - beta2^(s+1))) + eps)      v: Adam's own
    decay(s)    = - lr weight_decay theta(s)

Together they are theta(s+1) - theta(s). R_c = S_c W^T are K and V of concept c's prompt, whose states S_c change where the
token is trained. Some steps, from s to t, change them by

    S_c(s) (theta(t) - theta(s))^T + (S_c(t) - S_c(s)) theta(t)^T

of which the first part is shared by `dtheta_i`. The second is the token's. It is shared in proportion to how far each image
moved the token's embedding along its way where the token alone is trained. Beside weights it is small (-5 to 7 % of the
change in three models of icon-sd), and is left as no image's. What remains, in rounding and of images that were let go of, is
the `rest`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.prompt_states import PromptStates
from attrdb.ingest.monitor.slot_gradients import SlotGradients, Target

QUARTERS = 4
BOOKED_EVERY = 5  # steps: what they did to K and V is computed at once
MEMORY = 2**30  # bytes that the images' momentum may take; images that were not drawn for long are let go of
LEAST_FACTOR = (
    1e-6  # of a row of momentum; below, the row is multiplied by it, so that what is added to it stays in range
)
MAX_SUMMED = 64  # images of which the sum of all gradients is kept, if their momentum fits

WEIGHTS, TOKEN, REGULARIZATION, DECAY, REST = CAUSES = ("weights", "token", "regularization", "decay", "rest")


@dataclass(frozen=True)
class Change:
    """What one cause did to K and V of a concept's prompt in a quarter of the steps, from 1.

    image:    index of the exemplar; None for causes that are no exemplar's
    n_visits: slots that drew the exemplar; None without one
    norm:     sum, over every five steps or fewer, of the length of the change; None for the token's and the rest
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
    """Books the changes of a run, some steps at a time.

    What is booked has a row for each exemplar, then one for all regularization images, and one for the decay of weights.

    prompts: of each concept, one or more
    raises:  InvalidValue, as `SlotGradients`
    """

    def __init__(self, run: Run, prompts: Sequence[Sequence[str]]):
        self.run = run
        self.gradients = SlotGradients(run)
        self.prompt_states = PromptStates(run, prompts)
        try:
            self._begin(prompts)
        except BaseException:
            self.close()
            raise

    def _begin(self, prompts: Sequence[Sequence[str]]) -> None:
        run, device = self.run, self.run.base.device
        self.flat, self.adam = self.gradients.flat, run.optimizer_settings
        self.momentum = Momentum(run, self.flat.size)
        # Of the steps that are not booked yet.
        self.updates = torch.zeros(len(self.momentum.rows) + 1, self.flat.size, device=device)
        self.divisor = torch.empty(self.flat.size, device=device)  # Adam's
        self.sums: torch.Tensor | None = None
        if run.n_exemplars <= min(MAX_SUMMED, self.momentum.n_images):
            self.sums = torch.zeros(run.n_exemplars, self.flat.size, device=device)
        self.prior, self.decay = run.n_exemplars, run.n_exemplars + 1
        n_rows = self.decay + 1
        self.n_visits = torch.zeros(QUARTERS, n_rows, dtype=torch.int64)
        self.token_of = [_token_in(of_concept, self.gradients.tokens) for of_concept in prompts]
        self.states, self.before = self.prompt_states.now(), run.weights()  # as they were when changes were last booked
        self.start = [self._projected(states) for states in self.states]
        self.at_ends: dict[int, list[torch.Tensor]] = {}  # of each quarter that was trained, K and V of each concept
        self.by_weights = [torch.zeros(QUARTERS, n_rows, *start.shape, device=device) for start in self.start]
        # Where tokens alone are trained, of each row; else of all rows together.
        n_shares = n_rows if self.gradients.watches_tokens else 1
        self.by_token = [torch.zeros(QUARTERS, n_shares, *start.shape, device=device) for start in self.start]
        self.norms = torch.zeros(len(prompts), QUARTERS, n_rows, device=device)

    def close(self) -> None:
        self.gradients.remove()
        self.prompt_states.remove()

    @property
    def gradient_sums(self) -> Tensors | None:
        """(n_exemplars, *shape) float32 by trained weight: each exemplar's gradients, over all steps; None if not kept."""
        return None if self.sums is None else self.flat.views(self.sums)

    def before_update(self, step: Step) -> torch.Tensor:
        """Take the step's gradients; (n_slots,) float32, their norms."""
        slots = self.gradients.take(step)
        rows = torch.where(step.is_exemplar, step.images, self.prior)
        drawn: dict[int, list[int]] = defaultdict(list)  # slots by row
        for slot, row in enumerate(rows.tolist()):
            drawn[row].append(slot)
        ends_quarter = step.number > 0 and self._quarter(step.number) != self._quarter(step.number - 1)
        if step.number and (ends_quarter or step.number % BOOKED_EVERY == 0 or not self.momentum.holds(drawn)):
            self._book(step.number - 1)
        self.n_visits[self._quarter(step.number)] += torch.bincount(rows, minlength=self.decay + 1)
        for row, momentum in self.momentum.decayed(drawn, self.adam["betas"][0]).items():
            targets = [momentum]
            if self.sums is not None and row != self.prior:
                targets.append((self.sums[row], 1.0))
            slots.add(drawn[row], targets)
        for name, decayed in self.flat.views(self.updates[-1:]).items():
            decayed[0].add_(self.run.parameters[name], alpha=-self.adam["lr"] * self.adam["weight_decay"])
        return slots.norms()

    def after_update(self, step: Step) -> None:
        """Add what the update did to the weights."""
        self.prompt_states.forget()
        (beta1, beta2), lr, eps = (self.adam[name] for name in ("betas", "lr", "eps"))
        squares = self.run.squares()
        for name, divisor in self.flat.views(self.divisor[None]).items():
            if name in squares:
                torch.sqrt(squares[name], out=divisor[0])
            else:
                divisor.fill_(1.0)  # the loss has not depended on the weight yet
        self.divisor.mul_((1 - beta2 ** (step.number + 1)) ** -0.5).add_(eps)
        scale = -lr / (1 - beta1 ** (step.number + 1))
        for place, factor in enumerate(self.momentum.factors):
            self.updates[place].addcdiv_(self.momentum.of_images[place], self.divisor, value=scale * factor)

    def finish(self) -> None:
        """Book what the last steps did; called after them."""
        self._book(self.run.settings.steps - 1)

    def _book(self, number: int) -> None:
        """Book the steps up to one: what they did to the weights, and to the token, which shows in the states after them."""
        quarter, states, updates = self._quarter(number), self.prompt_states.now(), self.flat.views(self.updates)
        rows = torch.tensor([*self.momentum.rows, self.decay], device=self.run.base.device)
        for concept, (before, after) in enumerate(zip(self.states, states, strict=True)):
            parts = [projection.change(before, updates, self.before) for projection in self.gradients.of_prompts]
            changed = torch.cat(parts, dim=-1)
            self.by_weights[concept][quarter, rows] += changed
            self.norms[concept, quarter, rows] += changed.flatten(1).norm(dim=1)
            if self.gradients.watches_tokens:
                shares = _shares(updates[self.token_of[concept]])
                self.by_token[concept][quarter, rows] += shares[:, None, None] * self._projected(after - before)
            elif self.gradients.tokens:
                self.by_token[concept][quarter, 0] += self._projected(after - before)
        if number + 1 == self.run.settings.steps or self._quarter(number + 1) != quarter:
            self.at_ends[quarter] = [self._projected(of_concept) for of_concept in states]
        self.states, self.before = states, self.run.weights()
        self.updates.zero_()

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
                    yield in_quarter(TOKEN, None, None, None, by_token[0])
                decayed = by_weights[self.decay] + (by_token[self.decay] if self.gradients.watches_tokens else 0.0)
                yield in_quarter(DECAY, None, None, norms[self.decay], decayed)
                yield in_quarter(REST, None, None, None, (rest * direction).sum().item())

    def _quarter(self, number: int) -> int:
        """Of a step; both from 0."""
        return number * QUARTERS // self.run.settings.steps

    def _projected(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens, widths of all K and V)."""
        return torch.cat([projection.project(states) for projection in self.gradients.of_prompts], dim=-1)


class Momentum:
    """Adam's running mean of the gradient, shared among images: of as many images as there is memory for.

    of_images: (n, n_weights) float32, each to be multiplied by its factor
    factors:   of these n; where a step does not draw an image, only its factor changes
    rows:      of these n
    """

    def __init__(self, run: Run, n_weights: int):
        fits = max(2 * run.settings.batch, MEMORY // (4 * n_weights))
        self.n_images, self.n_steps = min(run.n_exemplars, fits), 0
        self.rows = [*range(self.n_images), *[run.n_exemplars] * bool(run.prior_prompts)]
        self.last_drawn = [-1] * len(self.rows)
        self.of_images = torch.zeros(len(self.rows), n_weights, device=run.base.device)
        self.factors = [1.0] * len(self.rows)

    def holds(self, drawn: Collection[int]) -> bool:
        """Whether it has all of these rows. Where not, `decayed` gives up others for them."""
        return set(drawn) <= set(self.rows)

    def decayed(self, drawn: Collection[int], beta: float) -> dict[int, Target]:
        """Decay all by a step; of each row that the step draws, what its gradients are to be added to."""
        places = {row: self._place(row, drawn) for row in drawn}
        for place in range(len(self.rows)):
            self.factors[place] *= beta
            if self.factors[place] < LEAST_FACTOR:
                self.of_images[place] *= self.factors[place]
                self.factors[place] = 1.0
        self.n_steps += 1
        return {row: (self.of_images[place], (1 - beta) / self.factors[place]) for row, place in places.items()}

    def _place(self, row: int, drawn: Collection[int]) -> int:
        """Where the row is; one that is not there takes the place of the image that was not drawn for longest."""
        if row not in self.rows:
            others = [place for place in range(self.n_images) if self.rows[place] not in drawn]
            place = min(others, key=lambda place: self.last_drawn[place])
            self.rows[place] = row
            self.of_images[place], self.factors[place] = 0, 1.0
        place = self.rows.index(row)
        self.last_drawn[place] = self.n_steps
        return place


def _token_in(prompts: Sequence[str], tokens: Mapping[str, str]) -> str:
    """The parameter of the first token that the prompts name; empty without one."""
    return next((key for token, key in tokens.items() if any(token in prompt for prompt in prompts)), "")


def _shares(updates: torch.Tensor) -> torch.Tensor:
    """(n,): of n updates (n, width), their parts along the sum of all, which add up to 1."""
    whole = updates.sum(dim=0)
    return updates @ whole / whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
