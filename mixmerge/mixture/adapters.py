"""The row of ``compose: {kind: adapters}``: experts as changes of one base, weighed by a gate."""

from __future__ import annotations

from mixmerge.mixture.gated import AdaptersOptions, check_gated
from mixmerge.mixture.network import check_fitted, setup_of_network
from mixmerge.mixture.network_fitting import fit_network
from mixmerge.mixture.wholes import Whole

ADAPTERS = Whole(
    options=AdaptersOptions,
    instead="the gate weighs the experts",
    mark="bank/bank.json",
    folders=("folder", "base", "encoder", "given"),
    files=("data",),
    check=check_gated,
    ready=check_fitted,
    setup=setup_of_network,
    fit=fit_network,
)
