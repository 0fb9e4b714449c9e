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
    "knn": RouterRow(
        "mixmerge.routers.nearest:NearestRouter",
        "mean score of the nearest queries, shrunk to the expert's mean",
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
