"""``mixmerge fit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.batch import Revision, TrustEndpoints
from mixmerge.cli.route.options import Json, Overwrite, Quiet
from mixmerge.cli.show import emit_json, size, step_progress

if TYPE_CHECKING:
    from mixmerge.mixture.adding import Newcomer


def fit(
    mixture: Annotated[
        Path,
        typer.Argument(
            metavar="MIXTURE",
            help="Its YAML, or a hub id; with --add a network's fitted folder.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)],
    newcomer: Annotated[
        str | None,
        typer.Option(
            "--add",
            metavar="NAME=PATH",
            help="Expert to add to a fitted network: an adapter, or a full model with --rank.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows of the added expert, for a gate that learns.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of an added full model.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where gate or glue learn: cpu, cuda, ...")] = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    revision: Revision = None,
    trust_endpoints: TrustEndpoints = False,
) -> None:
    """Fit what a mixture needs, as a folder that ask and batch take.

    Of a mixture with a router, that router, on the outcomes it names. Of
    one with compose: {kind: adapters}, the bank of its experts and the gate
    that weighs them for each token or prompt; eval takes it, too. Of one
    with {kind: logits}, the fixed strength of its experts that is best on
    data. Of one with {kind: latent}, the glue by which its experts read each
    other; killed, it goes on with the same command. Experts and base are
    named in the folder, not copied.

    With --add, OUT is the fitted network MIXTURE and one expert more: what
    the gate has learned of the others stays. Gates that weigh all their
    experts by one fit refuse.
    """
    from mixmerge.mixture.adding import add, check_folder
    from mixmerge.mixture.gluing import fit as fit_mixture
    from mixmerge.mixture.hub import spec_from

    added = _newcomer(newcomer, data, rank)
    if added is not None:
        check_folder(mixture)
    spec = spec_from(mixture, revision=revision, trust_endpoints=trust_endpoints)
    with step_progress(quiet=quiet) as progress:
        if added is None:
            done = fit_mixture(spec, out, overwrite=overwrite, device=device, progress=progress)
        else:
            done = add(spec, out, added, overwrite=overwrite, device=device, progress=progress)
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


def _newcomer(text: str | None, data: str | None, rank: int | None) -> Newcomer | None:
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.mixture.adding import Newcomer

    if text is None:
        said = {"--data": data, "--rank": rank}
        faults = [
            Fault(
                option,
                "has no effect without --add",
                "compose: of the mixture says it for all",
                "Leave it out",
            )
            for option, value in said.items()
            if value is not None
        ]
        if faults:
            raise MixmergeError(faults)
        return None
    name, _, place = text.partition("=")
    if not name.strip() or not place:
        raise MixmergeError(Fault("--add", f"is {text!r}", "NAME=PATH, such as math=./adapters/math"))
    return Newcomer(name.strip(), place, data, rank)
