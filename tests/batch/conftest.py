"""Files of requests, as people have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.batch.lines import Input


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Input]:
    """A job of a file with the given content; its experts are ``math`` and ``code``."""

    def make(
        content: str | bytes, name: str = "job.jsonl", *, called: str | None = None, **options: Any
    ) -> Input:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return Input.open(path, experts=("math", "code"), mixture_name="mix", name=called or name, **options)

    return make
