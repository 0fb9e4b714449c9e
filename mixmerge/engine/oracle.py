"""``--engine mergekit``: the same recipe through the installed mergekit, for comparison."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

from mixmerge.engine.target import check_target
from mixmerge.errors import DependencyError, Fault, MixmergeError, OutputError
from mixmerge.plan import make_plan
from mixmerge.recipe import canonical
from mixmerge.recipe.schema import to_yaml

_OURS = ("agg", "scope", "rescale_by")


def merge_by_mergekit(recipe: Path, out: Path, *, overwrite: bool = False) -> None:
    """Run a recipe through mergekit, after the same checks as our own engine makes.

    Raises:
        DependencyError: mergekit is not installed.
        RecipeError, OutputError: as ``mixmerge.merge``.
        MixmergeError: the recipe uses parameters mergekit does not have, or mergekit failed.
    """
    if importlib.util.find_spec("mergekit") is None:
        raise DependencyError(
            Fault("--engine mergekit", "mergekit is not installed", run="pip install 'mixmerge[mergekit]'")
        )
    plan = make_plan(recipe)
    check_target(plan, out, overwrite=overwrite)
    document = canonical(plan.recipe)
    levels = [document.get("parameters", {}), *(model.get("parameters", {}) for model in document["models"])]
    ours = sorted({name for level in levels for name in level if name in _OURS})
    if ours:
        raise MixmergeError(
            Fault("--engine mergekit", f"mergekit has no {', '.join(ours)}", run="Leave --engine out")
        )
    seed, output = document.pop("seed"), document.pop("output")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that it appears there whole or not at all; mergekit writes adapters merged, too.
        with TemporaryDirectory(prefix=f".{out.name}.mergekit-", dir=out.parent) as scratch:
            made = Path(scratch, "model")
            options = MergeOptions(
                allow_crimes=False,
                random_seed=seed,
                out_shard_size=output["shard_size"],
                lora_merge_cache=str(Path(scratch, "adapters")),
                write_model_card=False,
                quiet=True,
            )
            run_merge(
                MergeConfiguration.model_validate(document),
                str(made),
                options,
                config_source=to_yaml(document),
            )
            if out.exists():
                out.rename(Path(scratch, "replaced"))
            made.rename(out)
    except OSError as error:
        raise OutputError(Fault(str(out), f"cannot be written: {error.strerror or error}")) from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise MixmergeError(
            Fault("mergekit", f"it failed: {reason[0] if reason else type(error).__name__}")
        ) from error
