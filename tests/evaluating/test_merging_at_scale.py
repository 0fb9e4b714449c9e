"""The example ``merging_at_scale.py`` runs, on models that have learned next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_merging_at_scale(zoo: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "merging_at_scale.py"
    options = ["--out", "scale", "--effort", "0.01", "--limit", "3", "--methods", "linear"]
    done = subprocess.run(
        [sys.executable, script, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scale" / "merging-at-scale.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "scale" / "merging-at-scale.json").read_text(encoding="utf-8"))
    assert set(found["reports"]) == {"weak", "strong"}
    rows = [row["name"] for row in found["reports"]["weak"]["rows"]]
    # Two sets of two, three and four experts, and all five; then the experts and their base.
    assert len(rows) == 7 + 5 + 1
    assert rows[0] == "linear-reverse+decrypt"
    assert done.stdout.strip().splitlines()[-1].endswith("merging-at-scale.png")
