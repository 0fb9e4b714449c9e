"""Who is active for a prompt, who of them answers, and how much each counts: on the path of the answer's loss.

Shapes: B rows, f features of a text, M experts, K active ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from mixmerge.engines.records import Message
from mixmerge.errors import DependencyError, Fault
from mixmerge.latent.settings import RouteOptions

Encode = Callable[[Sequence[str]], Tensor]  # texts to (B, f), float32, each of length 1
_PIECES = (1, 4)  # letters of a hashed piece of a word
_MOST = 30.0  # an inactive expert's score above the best active one's, as far as the gradient looks


@dataclass(frozen=True, eq=False)
class Routes:
    """What is decided for the rows of a step.

    Args:
        scores: ``(B, M)`` of who is active and how much it counts, without noise, with gradient.
        active: ``(B, K)``, whole numbers, rising.
        primary: ``(B,)``, one of the active.
        gates: ``(B, M)``: of the active ones what adds up to 1, with gradient; 0 of all others.
        answers: ``(B, M)``, scores of who answers, without noise, with gradient; None where that was decided before.
    """

    scores: Tensor
    active: Tensor
    primary: Tensor
    gates: Tensor
    answers: Tensor | None = None


@dataclass(frozen=True)
class Routed:
    """What is decided for one prompt.

    Args:
        primary: who answers.
        gates: of every active expert, the primary among them; they add up to 1.
        scores: of every expert; of a fixed routing none.
    """

    primary: str
    gates: Mapping[str, float]
    scores: Mapping[str, float]


def routed_text(prompt: str | Sequence[Message]) -> str:
    """What a router reads of a prompt: the text, or what users said in the chat, with empty lines between."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(turn.content for turn in prompt if turn.role == "user")


class HashedText:
    """Texts as features without a model: pieces of words, 1 to 4 letters long, counted by their hash.

    Args:
        features: 16 or more.

    Raises:
        DependencyError: scikit-learn is not installed.
    """

    def __init__(self, features: int) -> None:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError as error:
            what = "hashed features take the package scikit-learn"
            raise DependencyError(
                Fault("compose.route.encoder", what, run="pip install mixmerge[route]")
            ) from error
        self._made = HashingVectorizer(analyzer="char_wb", ngram_range=_PIECES, n_features=features)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``(B, features)``, float32."""
        found = self._made.transform(list(texts)).toarray()
        return torch.from_numpy(found).float()


class LatentRouter(nn.Module):
    """Scores of experts by a small network over frozen features of the prompt's text.

    Source: Mixture of Thoughts (arXiv 2509.21164), as summarised by others: an MLP, the top K, Gumbel noise and a
    straight-through choice while it learns. Its last layer starts at 0: all experts alike.

    Deviation: who answers has scores of its own. With one score for both, a router that is sure of who answers has
    nobody be read, and one that wants an expert read has it answer.

    Args:
        features: f.
        experts: M.
        options: its layers, k, noise and temperature.
        primary: the expert that always answers; None: the best, by the second M scores.
    """

    def __init__(
        self, features: int, experts: int, options: RouteOptions, *, primary: int | None = None
    ) -> None:
        super().__init__()
        self.options, self.primary, self.features, self.experts = options, primary, features, experts
        widths = [features, *options.hidden]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.SiLU()]
        last = nn.Linear(widths[-1], experts if primary is not None else 2 * experts)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def scores(self, features: Tensor) -> Tensor:
        """``(B, f)`` of length 1 to ``(B, M)``, or ``(B, 2 M)`` where it says who answers."""
        found: Tensor = self.layers(features * self.features**0.5)
        return found

    def forward(
        self, features: Tensor, *, draw: torch.Generator | None = None, primary: Tensor | None = None
    ) -> Routes:
        """Decide.

        Args:
            features: ``(B, f)``.
            draw: of the noise, on the CPU; None: there is none, as when it answers.
            primary: ``(B,)``, who answers, where that was decided before.
        """
        both = self.scores(features).float()
        scores, answers = both[:, : self.experts], None
        if primary is None and self.primary is not None:
            primary = torch.full((len(scores),), self.primary, device=scores.device)
        if primary is None:
            answers = both[:, self.experts :]
            primary = (answers.detach() + self._noise(answers, draw)).argmax(-1)  # ties: the first of them
        noise = None if draw is None else self._noise(scores, draw)
        routes = decide(
            scores, self.options.k, primary=primary, noise=noise, temperature=self.options.temperature
        )
        return replace(routes, answers=answers)

    def _noise(self, scores: Tensor, draw: torch.Generator | None) -> Tensor:
        if draw is None:
            return torch.zeros_like(scores)
        return self.options.noise * gumbel(scores.shape, draw).to(scores.device)


def gumbel(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Standard Gumbel noise, ``-log(-log u)``, on the CPU."""
    uniform = torch.rand(*shape, generator=draw).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log()


def decide(
    scores: Tensor,
    k: int,
    *,
    primary: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Routes:
    """The top k of perturbed scores, and gates by the scores as they are.

    The gates are the softmax over the active experts. Noise decides who is active, not what the active ones weigh, so
    that a routing which learned with noise answers as it did. With noise the choice is straight-through: forward who is
    active is a fact, backward it is ``softmax((s + noise) / temperature)``, so that an expert that was left out gets a
    gradient, too.

    Args:
        scores: ``(B, M)``.
        k: 1 or more; above M it is M.
        primary: ``(B,)``, always active; None: the best by the perturbed scores.
        noise: ``(B, M)``; None: when it answers.
        temperature: above 0.
    """
    scores = scores.float()
    perturbed = scores if noise is None else scores + noise
    ranked = perturbed.detach()
    if primary is None:
        primary = ranked.argmax(-1)
    first = ranked.scatter(1, primary[:, None], float("inf"))
    order = first.argsort(dim=-1, descending=True, stable=True)  # ties: the first of them
    active = order[:, :k].sort(dim=-1).values  # (B, K)
    chosen = torch.zeros_like(scores).scatter(1, active, 1.0)  # (B, M)
    if noise is not None:
        soft = (perturbed / temperature).softmax(-1)
        chosen = chosen + (soft - soft.detach())
    best = scores.detach().gather(1, active).max(-1, keepdim=True).values
    odds = chosen * (scores - best).clamp(max=_MOST).exp()
    return Routes(scores, active, primary, odds / odds.sum(-1, keepdim=True))


def fixed(rows: int, experts: int, primary: int) -> Routes:
    """All experts active and alike."""
    return Routes(
        torch.zeros(rows, experts),
        torch.arange(experts).expand(rows, experts),
        torch.full((rows,), primary),
        torch.full((rows, experts), 1 / experts),
    )


class Routing:
    """A routing at work.

    Args:
        experts: names, in the glue's order.
        router: None: a fixed one.
        encode: texts to features, where there is a router.
        primary: of a fixed routing.
    """

    def __init__(
        self,
        experts: Sequence[str],
        router: LatentRouter | None,
        encode: Encode | None,
        *,
        primary: str | None = None,
    ) -> None:
        self.experts, self.router, self.encode, self.primary = tuple(experts), router, encode, primary

    def __call__(self, prompts: Sequence[str | Sequence[Message]]) -> list[Routed]:
        """Who answers each prompt, and who is read."""
        if self.router is None or self.encode is None:
            routes = fixed(len(prompts), len(self.experts), self.experts.index(str(self.primary)))
        else:
            device = next(self.router.parameters()).device
            features = self.encode([routed_text(one) for one in prompts]).to(device)
            with torch.no_grad():
                routes = self.router(features)
        learned = self.router is not None
        found = []
        for active, primary, gates, scores in zip(
            routes.active.tolist(),
            routes.primary.tolist(),
            routes.gates.tolist(),
            (routes.scores if routes.answers is None else routes.answers).tolist(),
            strict=True,
        ):
            weights = {self.experts[at]: gates[at] for at in active}
            told = dict(zip(self.experts, scores, strict=True)) if learned else {}
            found.append(Routed(self.experts[primary], weights, told))
        return found
