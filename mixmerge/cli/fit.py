"""``mixmerge fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixmerge.cli.batch import Revision, TrustEndpoints
from mixmerge.cli.route.options import Json, Overwrite, Quiet
from mixmerge.cli.show import emit_json, size, step_progress


def fit(
    mixture: Annotated[
        Path, typer.Argument(metavar="MIXTURE", help="Its YAML, or a hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)],
    device: Annotated[str, typer.Option("--device", help="Where gate or glue learn: cpu, cuda, ...")] = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    revision: Revision = None,
    trust_endpoints: TrustEndpoints = False,
) -> None:
    """Fit what a mixture needs, as a folder that ask, batch and eval take.

    Of a mixture with a router, that router, on the outcomes it names. Of
    one with compose: {kind: adapters}, the bank of its experts and the gate
    that weighs them for each token or prompt. Of one with {kind: logits},
    the fixed strength of its experts that is best on data. Of one with
    {kind: latent}, the glue by which its experts read each other; killed, it
    goes on with the same command. Experts and base are named in the folder,
    not copied.
    """
    from mixmerge.mixture.gluing import fit as fit_mixture
    from mixmerge.mixture.hub import spec_from

    spec = spec_from(mixture, revision=revision, trust_endpoints=trust_endpoints)
    with step_progress(quiet=quiet) as progress:
        done = fit_mixture(spec, out, overwrite=overwrite, device=device, progress=progress)
    if json:
        emit_json(done.as_dict())
        return
    facts = done.facts
    print(f"{done.path}: {done.kind} {done.what} of {', '.join(done.experts)}")
    if done.what == "network":
        share = 100 * facts["bytes"] / facts["base_bytes"] if facts["base_bytes"] else float("nan")
        print(
            f"{facts['sites']:,} matrices with {facts['parameters']:,} numbers: {size(facts['bytes'])}, "
            f"{share:.1f} % of the base's {size(facts['base_bytes'])}"
        )
    elif done.what == "router":
        print(f"fitted on {facts['queries']:,} queries")
    for note in done.notes:
        print(note)
