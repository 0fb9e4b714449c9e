"""Mixtures: the YAML of the design, all that can be wrong with one, and one at work on real files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.decision import Policy, calibrate_budget, write_policy
from mixmerge.decision.files import read_calibration
from mixmerge.decision.records import queries_of
from mixmerge.document.sections import arguments_of
from mixmerge.errors import MixmergeError
from mixmerge.mixture import ExpertSpec, Mixture, PriceSpec, parse, read
from mixmerge.registry import find, table
from mixmerge.routers.base import Router
from mixmerge.routers.contract import sample
from mixmerge.routers.nearest import NearestRouter

DESIGN = """
experts:
  math:  {model: ./experts/math}
  code:  {model: org/code-7b, engine: vllm}
  tutor: {adapter: ./adapters/tutor, base: ./base}
  cloud: {endpoint: http://localhost:8000/v1, model: big, price: {input: 0.2, output: 0.6}}
router:  {kind: knn, outcomes: outcomes.parquet}
policy:  {kind: top_k, k: 3, fallback: tutor, abstain_below: 0.2}
compose: {kind: answer}
generate: {max_new_tokens: 256, temperature: 0.0, seed: 7}
"""
ROUTER = "router: {kind: knn, outcomes: x.jsonl}\n"
EXPERTS = "experts: {a: {model: m}, b: {model: n}}\n"
FORMS = "Either model, or adapter and base, or endpoint and model."


def said(text: str) -> list[str]:
    found = parse(text)
    assert (found.mixture is None) == bool(found.faults)
    return [str(fault) for fault in found.faults]


def faults(source: object) -> list[str]:
    with pytest.raises(MixmergeError) as error:
        Mixture.load(source)  # type: ignore[arg-type]
    return [str(fault) for fault in error.value.faults]


def test_the_mixture_of_the_design() -> None:
    mixture = parse(DESIGN).require()
    assert list(mixture.experts) == ["math", "code", "tutor", "cloud"]
    assert mixture.experts["tutor"] == ExpertSpec(adapter="./adapters/tutor", base="./base")
    assert mixture.experts["cloud"].price == PriceSpec(input=0.2, output=0.6)
    assert mixture.router.kind == "knn"
    assert mixture.policy == Policy(kind="top_k", k=3, fallback="tutor", abstain_below=0.2)
    assert (mixture.generate.seed, mixture.compose.kind) == (7, "answer")


def test_what_is_not_written_has_its_default() -> None:
    mixture = parse(EXPERTS + ROUTER + "policy:\ncompose: ~\ngenerate:\n").require()
    assert mixture.policy is None
    assert (mixture.compose.kind, mixture.generate.max_new_tokens) == ("answer", 256)
    assert parse(EXPERTS + "router: {folder: r}").require().router.folder == "r"


def test_numbers_may_be_written_with_exponents() -> None:
    text = EXPERTS.replace("m}", "m, price: {input: 1e-3, output: 2E2}}")
    mixture = parse(text + ROUTER + "policy: {kind: budget, budget: 1e-5, trade: 3}\n").require()
    assert mixture.policy is not None
    assert (mixture.policy.budget, mixture.policy.trade) == (1e-5, 3.0)
    assert mixture.experts["a"].price == PriceSpec(input=1e-3, output=200.0)


def test_options_and_features_are_checked_by_the_router() -> None:
    written = (
        "router: {kind: knn, outcomes: x, seed: 3, options: {k: 7}, features: {kind: tfidf, dimensions: 9}}"
    )
    router = parse(EXPERTS + written).require().router
    assert (router.options, router.features, router.seed) == ({"k": 7}, {"kind": "tfidf", "dimensions": 9}, 3)
    wrong = (
        "router: {kind: knn, outcomes: 3, seed: true, "
        "options: {k: 0, worht: 1}, features: {kind: tfidf, dimensions: a}}"
    )
    assert [one.split(".  ")[0].split(":")[0] for one in said(EXPERTS + wrong)] == [
        "router.options.worht (line 2)",
        "router.options.k (line 2)",
        "router.features.dimensions (line 2)",
        "router.outcomes (line 2)",
        "router.seed (line 2)",
    ]


@pytest.mark.parametrize("name", table("features"))
def test_all_features_can_be_named(name: str) -> None:
    assert "kind" not in arguments_of(find("features", name), name="features").model_fields


EVERYTHING = """
experts:
  math:  {modle: ./experts/math}
  code:  {model: 3, engine: vlm}
  tutor: {adapter: ./adapters/tutor}
  cloud: {endpoint: localhost:8000/v1, model: big, price: {input: -0.2, outptu: 0.6}}
  " x": {model: a}
router:  {kind: kn, outcoms: outcomes.parquet}
policy:  {kind: top_k, k: 30, z: 1.0, fallback: tutr, abstain_below: .nan}
compose: {kind: answr}
compose: {kind: answer}
generate: {max_new_tokens: 0, temprature: 1.0, seed: x}
polcy: {kind: argmax}
"""


def test_all_faults_at_once_with_path_and_line() -> None:
    starts = [
        "experts.math.modle (line 3): unknown key 'modle'. Did you mean 'model'? Known: ",
        f"experts.math (line 3): the expert has no model. {FORMS}",
        "experts.code.model (line 4): expected a valid string, got 3.",
        f"experts.tutor (line 5): adapter and base go together. {FORMS}",
        "experts.cloud.price.outptu (line 6): unknown key 'outptu'. Did you mean 'output'? Known: ",
        "experts.cloud.price.input (line 6): expected a number greater than or equal to 0, got -0.2.",
        "experts.cloud.price (line 6): the key output is missing.",
        "experts.cloud.endpoint (line 6): expected an address that begins with http:// or https://, got 'localh",
        "experts. x (line 7): ' x' is no name of an expert.",
        "router (line 8): the key outcomes is missing. kind and outcomes, or folder.",
        "router.kind (line 8): no router is called 'kn'. Did you mean 'knn'? Known: ",
        "router.outcoms (line 8): unknown key 'outcoms'. Did you mean 'outcomes'? Known: ",
        "policy.z (line 9): top_k does not use it. top_k takes k, fallback, abstain_below, seed.",
        "policy.abstain_below (line 9): should be a finite number, got nan.",
        "compose.kind (line 10): no composition is called 'answr'. Did you mean 'answer'? Known: ",
        "compose (line 11): the key is given twice (first in line 10).",
        "generate.temprature (line 12): unknown key 'temprature'. Did you mean 'temperature'? Known: ",
        "generate.max_new_tokens (line 12): expected a number greater than or equal to 1, got 0.",
        "generate.seed (line 12): expected a valid integer, got 'x'.",
        "polcy (line 13): unknown key 'polcy'. Did you mean 'policy'? Known: ",
    ]
    found = said(EVERYTHING)
    for one, start in zip(found, starts, strict=True):
        assert one.startswith(start)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "mixture: the mixture is empty. It needs experts and router."),
        ("- a", "mixture: a mixture is a mapping, got a list. It needs experts and router."),
        ("a: 1\n---\nb: 2", "mixture (line 2): files with several YAML documents are not supported."),
        ("a: [\n", "mixture (line 2, column 1): not valid YAML: "),
        (ROUTER, "experts: the mixture has no experts. Add experts:, with NAME: {model: PATH}."),
        ("experts: {}\n" + ROUTER, "experts (line 1): the mixture has no experts."),
        ("experts: [a]\n" + ROUTER, "experts (line 1): expected a mapping of experts by name, got a list."),
        (
            "experts: {a: m}\n" + ROUTER,
            "experts.a (line 1): expected a mapping of what the expert is (model: PATH), got 'm'.",
        ),
        ("experts: {a: }\n" + ROUTER, f"experts.a (line 1): the expert has no model. {FORMS}"),
        (
            "experts: {1: {model: m}, a: {model: m}}\n" + ROUTER,
            "experts (line 1): a key must be text, got 1.",
        ),
        (
            "experts: {a: {model: m, engine: vlm}}\n" + ROUTER,
            "experts.a.engine (line 1): no engine is called 'vlm'. Did you mean 'vllm'?",
        ),
        (
            "experts: {a: {model: m, base: b}}\n" + ROUTER,
            "experts.a (line 1): model, and adapter or base, are both given.",
        ),
        (
            "experts: {a: {endpoint: http://x}}\n" + ROUTER,
            "experts.a (line 1): the key model is missing: its name behind",
        ),
        (
            "experts: {a: {endpoint: http://x, model: m, engine: vllm}}\n" + ROUTER,
            "experts.a (line 1): an expert behind an endpoint is not run by vllm.",
        ),
        (
            "experts: {a: {endpoint: http://x, model: m, base: b}}\n" + ROUTER,
            "experts.a (line 1): an expert behind an endpoint has no adapter",
        ),
        (
            "experts: {a: {model: m, engine: openai}}\n" + ROUTER,
            "experts.a (line 1): the key endpoint is missing",
        ),
        (EXPERTS, "router: the mixture has no router. Add router: {kind: ..., outcomes: FILE}."),
        (EXPERTS + "router: knn", "router (line 2): expected a mapping of kind and outcomes, got 'knn'."),
        (
            EXPERTS + "router: {kind: [knn], outcomes: x}",
            "router.kind (line 2): expected the name of a router, got a list.",
        ),
        (
            EXPERTS + "router: {kind: oracle, outcomes: x}",
            "router.kind (line 2): oracle looks at the outcomes of the very queries",
        ),
        (
            EXPERTS + "router: {folder: r, seed: 1}",
            "router.seed (line 2): has no effect on a fitted router. Remove it, or remove folder.",
        ),
        (
            EXPERTS + "router: {kind: random, outcomes: x, features: {kind: tfidf}}",
            "router.features (line 2): random uses no features.",
        ),
        (
            EXPERTS + "router: {kind: knn, outcomes: x, features: {kind: tfid}}",
            "router.features.kind (line 2): no features is called 'tfid'. Did you mean 'tfidf'?",
        ),
        (
            EXPERTS + "router: {kind: knn, outcomes: x, features: {dimensions: 3}}",
            "router.features (line 2): the key kind is missing.",
        ),
        (
            EXPERTS + ROUTER + "policy: argmax",
            "policy (line 3): expected a mapping of kind and numbers of a policy, got",
        ),
        (EXPERTS + ROUTER + "policy: {kind: top_k}", "policy (line 3): policy.k: top_k needs it."),
        (
            EXPERTS + ROUTER + "policy: {kind: topk}",
            "policy.kind (line 3): no policy is called 'topk'. Did you mean 'top_k'?",
        ),
        (
            EXPERTS + ROUTER + "policy: {kind: top_k, k: 3}",
            "policy.k (line 3): there are only 2 experts. At most 2.",
        ),
        (
            EXPERTS + ROUTER + "policy: {fallback: c}",
            "policy.fallback (line 3): the mixture has no expert 'c'. Known: a, b.",
        ),
        (
            EXPERTS + ROUTER + "policy: {seed: 1, sed: 2}",
            "policy.sed (line 3): unknown key 'sed'. Did you mean 'seed'?",
        ),
    ],
)
def test_one_fault(text: str, wanted: str) -> None:
    found = said(text)
    assert len(found) == 1
    assert found[0].startswith(wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["knn", "top_k", "a", "", "1e5"])
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    ["experts", "router", "policy", "compose", "generate", "kind", "k", "model", "price",
                     "input", "output", "options", "features", "folder", "outcomes", "a", "seed", "strong"]
                ),
                inner,
                max_size=5,
            ),
        ),
        max_leaves=25,
    )
)  # fmt: skip
def test_nothing_written_is_a_crash(value: object) -> None:
    import yaml

    found = parse(yaml.safe_dump(value))
    assert (found.mixture is None) == bool(found.faults)
    found = read({"experts": value, "router": value, "policy": value, "generate": value})
    assert (found.mixture is None) == bool(found.faults)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert faults(missing) == [f"{missing}: cannot read the mixture: No such file or directory."]
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("experts: é".encode("latin-1"))
    assert faults(latin) == [f"{latin}: the mixture is not UTF-8 text (byte 9). Save it as UTF-8."]


# --- at work


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outcomes") / "outcomes.jsonl"
    sample().write(path)
    return path


def written(folder: Path, router: str, *, policy: str = "", experts: str = "sums code verse plain") -> Path:
    lines = [f"  {name}: {{model: ./{name}, price: {{input: 1, output: 2}}}}" for name in experts.split()]
    path = folder / "mixture.yaml"
    path.write_text("\n".join(["experts:", *lines, f"router: {router}", policy]))
    return path


def test_a_mixture_routes(tmp_path: Path, outcomes: Path) -> None:
    router = f"{{kind: knn, outcomes: {outcomes}, options: {{k: 20}}}}"
    path = written(tmp_path, router, policy="policy: {kind: top_k, k: 2}", experts="plain verse code sums")
    mixture = Mixture.load(path)
    assert tuple(mixture.experts) == mixture.router.experts == ("plain", "verse", "code", "sums")
    assert mixture.router.options.model_dump()["k"] == 20
    held = queries_of(sample(60, seed=1))
    decisions = mixture.route(held, explain=True)
    assert [one.query_id for one in decisions] == [query.id for query in held]
    right = sum(one.primary == query.metadata["task"] for one, query in zip(decisions, held, strict=True))
    assert right >= 50
    first = decisions[0]
    assert (len(first.picks), first.policy, first.version) == (2, "top_k(k=2)", "unsaved")
    assert "neighbours" in first.reason
    assert "neighbours" not in mixture.route(held[:1])[0].reason
    assert mixture.route(["add a number to the total sum"])[0].primary == "sums"
    # the prices of the YAML are what costs are expected by: all alike here
    cost = mixture.router.score(held).cost
    assert cost is not None
    assert cost.max() < 1.4 * cost.min()


def test_a_mixture_of_a_fitted_router(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    NearestRouter({"k": 20}).fit(sample()).save(folder)
    path = written(tmp_path, f"{{folder: {folder}}}")
    mixture = Mixture.load(path)
    assert mixture.policy == Policy()
    assert mixture.router.version != "unsaved"
    held = sample(200, seed=3)
    found = calibrate_budget(mixture.router.score(queries_of(held)), held, budget=1e-4)
    write_policy(found, folder, router=mixture.router.version)
    beside = Mixture.load(path)
    assert beside.policy == found.policy
    assert beside.route(queries_of(held))[0].policy == found.policy.describe()
    write_policy(found, folder, router="another")
    assert "is of router 'another'" in faults(path)[0]
    assert Mixture.load(written(tmp_path, f"{{folder: {folder}}}", policy="policy: {}")).policy == Policy()


def test_the_router_and_the_mixture_have_the_same_experts(tmp_path: Path, outcomes: Path) -> None:
    router = f"{{kind: knn, outcomes: {outcomes}}}"
    assert faults(written(tmp_path, router, experts="sums code verse poet")) == [
        f"experts: {outcomes} does not know poet. It knows sums, code, verse, plain.",
        f"experts: the mixture lacks plain, which {outcomes} knows. Add them.",
    ]
    folder = tmp_path / "router"
    NearestRouter().fit(sample()).save(folder)
    (one,) = faults(written(tmp_path, f"{{folder: {folder}}}", experts="sums code verse"))
    assert one == f"experts: the mixture lacks plain, which the router in {folder} knows. Add them."


def test_what_is_not_there_is_refused(tmp_path: Path, outcomes: Path) -> None:
    router = f"{{kind: best_single, outcomes: {outcomes}}}"
    assert len(faults(written(tmp_path, "{kind: knn, outcomes: nowhere.jsonl}"))) == 1
    assert "is no fitted router" in faults(written(tmp_path, f"{{folder: {tmp_path}}}"))[0]
    voting = Mixture.load(written(tmp_path, router, policy="compose: {kind: twin}"))
    assert voting.route(["a question"])[0].primary
    with pytest.raises(MixmergeError, match="twin is not available in this version"):
        voting.answer(["a question"])
    budget = Mixture.load(written(tmp_path, router, policy="policy: {kind: budget, budget: 1e-3}"))
    with pytest.raises(MixmergeError, match="a budget needs the trade"):
        budget.route(["a question"])


def test_features_of_the_yaml_are_used(tmp_path: Path, outcomes: Path) -> None:
    router = f"{{kind: knn, outcomes: {outcomes}, features: {{kind: tfidf, dimensions: 5}}}}"
    mixture = Mixture.load(written(tmp_path, router))
    assert isinstance(mixture.router, Router)
    assert mixture.router.features is not None
    assert mixture.router.features.options()["dimensions"] == 5


# --- fitted mixtures


def test_a_saved_mixture_is_one_folder(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = (
        "policy: {kind: top_k, k: 2, fallback: plain}\ncompose: {kind: vote}\ngenerate: {max_new_tokens: 7}"
    )
    mixture = Mixture.load(written(tmp_path, f"{{kind: knn, outcomes: {outcomes}}}", policy=more))
    mixture.save("fitted")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "fitted").rename(tmp_path / "moved")
    held = queries_of(sample(30, seed=1))
    wanted = [one.picks for one in mixture.route(held)]
    for place in ("../moved", tmp_path / "moved", "../moved/mixture.yaml"):
        found = Mixture.load(place)
        assert [one.picks for one in found.route(held)] == wanted
        assert found.policy == mixture.policy
        assert (found.spec.compose, found.spec.generate) == (mixture.spec.compose, mixture.spec.generate)
    assert [found.experts[name].model for name in found.experts] == [
        str(tmp_path / name) for name in mixture.experts
    ]
    assert found.experts["code"].price == mixture.experts["code"].price
    router = Router.load("../moved")
    assert router.version == found.router.version != "unsaved"
    found.save("again")
    assert Mixture.load("again").router.version == router.version  # nothing in it depends on where it lies


def test_a_fitted_mixture_keeps_its_calibration(tmp_path: Path, outcomes: Path) -> None:
    folder = tmp_path / "router"
    Mixture.load(written(tmp_path, f"{{kind: knn, outcomes: {outcomes}}}")).save(folder)
    assert not (folder / "policy.json").exists()
    assert Mixture.load(folder).policy == Policy()
    mixture, held = Mixture.load(folder), sample(200, seed=3)
    found = calibrate_budget(mixture.router.score(queries_of(held)), held, budget=1e-3)
    write_policy(found, folder, router=mixture.router.version)
    Mixture.load(folder).save(tmp_path / "copy")
    assert Mixture.load(tmp_path / "copy").policy == found.policy
    assert read_calibration(tmp_path / "copy") == found
    Mixture.load(folder).save(folder, overwrite=True)
    assert Mixture.load(folder).policy == found.policy


def test_hub_ids_and_endpoints_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    NearestRouter().fit(sample()).save("router")
    experts = {
        "sums": {"model": "org/code-7b"},
        "code": {"adapter": "./lora", "base": "org"},
        "verse": {"endpoint": "http://localhost:8000/v1", "model": "./big"},
        "plain": {"model": "a/b/c"},
    }
    Mixture.load({"experts": experts, "router": {"folder": "router"}}).save("fitted")
    saved = Mixture.load("fitted").experts
    assert saved["sums"].model == "org/code-7b"
    assert (saved["code"].adapter, saved["code"].base) == (str(tmp_path / "lora"), str(tmp_path / "org"))
    assert saved["verse"].model == "./big"
    assert saved["plain"].model == str(tmp_path / "a/b/c")


def test_folders_that_are_no_mixture(tmp_path: Path, outcomes: Path) -> None:
    allowed = "A mixture YAML, or a folder with mixture.yaml and what was fitted. Make one: mixmerge fit"
    NearestRouter().fit(sample()).save(tmp_path / "router")
    (tmp_path / "empty").mkdir()
    assert f"empty: is no mixture. {allowed}" in faults(tmp_path / "empty")[0]
    (one,) = faults(str(tmp_path / "router"))
    assert f"router: is a router alone: it does not say what its experts are. {allowed}" in one
    mixture = Mixture.load(written(tmp_path, f"{{kind: knn, outcomes: {outcomes}}}"))
    with pytest.raises(MixmergeError, match="exists already"):
        mixture.save(tmp_path / "router")
    with pytest.raises(MixmergeError, match="is no router, so it is not replaced"):
        mixture.save(tmp_path / "empty", overwrite=True)
    assert list((tmp_path / "empty").iterdir()) == []
    mixture.save(tmp_path / "router", overwrite=True)
    mixture.router.state = None
    with pytest.raises(MixmergeError, match="is not fitted"):
        mixture.save(tmp_path / "unfitted")
    assert not list(tmp_path.glob("*unfitted*"))
    (tmp_path / "router" / "mixture.yaml").write_text("experts: {a: {model: b}}\nrouter: {folder: .}\n")
    assert "does not know a" in faults(tmp_path / "router")[0]
