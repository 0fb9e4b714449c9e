"""Every router of the table keeps the contract."""

from __future__ import annotations

import pytest

from mixmerge.registry import load
from mixmerge.routers import ROUTERS
from mixmerge.routers.contract import check_router

# What has to be said about the sample's experts, and less training than by default.
OPTIONS = {
    "hybrid": {"weak": "code", "strong": "sums", "members": 2},
    "mlp": {"members": 2},
    "mf": {"members": 1, "least": 300, "rate": 2e-3},
    "routerdc": {"members": 1, "least": 300, "rate": 2e-3},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name: str) -> None:
    row = ROUTERS[name]
    kind = load(row.target)
    if any(field.is_required() for field in kind.options_type.model_fields.values()):
        pytest.skip("it has options without a default; its own tests check the contract")
    check_router(lambda: kind(OPTIONS.get(name)), learns=row.learns)
