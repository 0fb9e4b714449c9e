"""Query-level routers: which expert would answer a query how well. Imported as ``mixmerge.routers``.

``ROUTERS`` is the table of their names; a package of yours adds one by an entry point of the group
``mixmerge.router`` that gives such a row, and tests it with ``mixmerge.routers.contract``.
"""

from __future__ import annotations

from dataclasses import dataclass

if __name__ != "mixmerge.routers":
    raise ImportError("import mixmerge.routers, not routers")


@dataclass(frozen=True)
class RouterRow:
    """One router.

    Args:
        target: ``module:Class`` of a ``mixmerge.routers.base.Router``.
        summary: what it does, in a line.
        paper: where it is from; "" for textbook methods.
        reference: it looks at the outcomes of the very queries it scores (oracles): for evaluation only.
        learns: it can pick better experts than chance for queries it has not seen; constants cannot.
    """

    target: str
    summary: str
    paper: str = ""
    reference: bool = False
    learns: bool = True


ROUTERS: dict[str, RouterRow] = {
    "random": RouterRow(
        "mixmerge.routers.constants:RandomRouter", "a draw for each query and expert, by seed", learns=False
    ),
    "best_single": RouterRow(
        "mixmerge.routers.constants:BestSingleRouter", "the expert of the best mean, always", learns=False
    ),
    "cheapest": RouterRow(
        "mixmerge.routers.constants:CheapestRouter",
        "the expert of the lowest expected cost, always",
        learns=False,
    ),
    "length": RouterRow(
        "mixmerge.routers.constants:LengthRouter", "score as a line of the query's length", learns=False
    ),
    "task_mean": RouterRow(
        "mixmerge.routers.constants:TaskMeanRouter", "mean score on the query's task, which has to be given"
    ),
    "oracle_task": RouterRow(
        "mixmerge.routers.references:OracleTaskRouter",
        "the best expert of the query's task, by the outcomes it is evaluated on",
        reference=True,
    ),
    "oracle": RouterRow(
        "mixmerge.routers.references:OracleRouter",
        "the best expert of the very query, by the outcomes it is evaluated on",
        reference=True,
        learns=False,
    ),
    "knn": RouterRow(
        "mixmerge.routers.nearest:NearestRouter",
        "mean score of the nearest queries, shrunk to the expert's mean",
    ),
    "pilots": RouterRow(
        "mixmerge.routers.pilots:PilotRouter",
        "likeness to the queries an expert is best at",
        "RouterRetriever, arXiv 2409.02685",
    ),
    "sw_ranking": RouterRow(
        "mixmerge.routers.ranking:RankingRouter",
        "strengths from pairs of outcomes, weighted by similarity",
        "RouteLLM, arXiv 2406.18665",
    ),
    "avengers": RouterRow(
        "mixmerge.routers.clusters:ClusterRouter",
        "mean score in the nearest clusters of queries, shrunk to the expert's mean",
        "The Avengers, arXiv 2505.19797",
    ),
    "ridge": RouterRow(
        "mixmerge.routers.linear:RidgeRouter",
        "ridge regression of scores (or gains) on the embedding, penalty by leave-one-out",
    ),
    "logistic": RouterRow(
        "mixmerge.routers.logistic:LogisticRouter", "logistic regression of scores in 0..1, calibrated"
    ),
    "mlp": RouterRow("mixmerge.routers.neural:MlpRouter", "small networks from the embedding to all scores"),
    "mf": RouterRow(
        "mixmerge.routers.factors:FactorsRouter",
        "factors of queries and experts, learned from who beats whom",
        "RouteLLM, arXiv 2406.18665",
    ),
    "hybrid": RouterRow(
        "mixmerge.routers.gap:GapRouter",
        "the chance that a weak expert is good enough beside a strong one",
        "Hybrid LLM, arXiv 2404.14618",
    ),
    "routerdc": RouterRow(
        "mixmerge.routers.contrastive:ContrastiveRouter",
        "queries near the experts that answer them well, by contrast",
        "RouterDC, arXiv 2409.19886",
    ),
    "encoder": RouterRow(
        "mixmerge.routers.finetuned:EncoderRouter", "a transformers encoder fine-tuned to the score vector"
    ),
    "causal": RouterRow(
        "mixmerge.routers.finetuned:CausalRouter",
        "a causal language model fine-tuned to score experts by label tokens",
        "RouteLLM, arXiv 2406.18665",
    ),
    "skills": RouterRow(
        "mixmerge.routers.skills:SkillRouter",
        "the expert's mean and what it gains at the query's skills, shrunk; explains itself by skills",
        "Symbolic-MoE, arXiv 2503.05641",
    ),
    "categories": RouterRow(
        "mixmerge.routers.categories:CategoriesRouter",
        "a classifier of categories and a map from category to expert, solved under a budget",
        "Composition of Experts, arXiv 2412.01868",
    ),
    "cascade": RouterRow(
        "mixmerge.routers.cascade_router:CascadeRouter",
        "another router's scores, with the order and the confidences of an escalation",
        "FrugalGPT, arXiv 2305.05176",
    ),
}
