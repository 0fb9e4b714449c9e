"""Every router of the table keeps the contract."""

from __future__ import annotations

import pytest

from mixmerge.registry import load
from mixmerge.routers import ROUTERS
from mixmerge.routers.contract import check_router


@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name: str) -> None:
    check_router(load(ROUTERS[name].target))
