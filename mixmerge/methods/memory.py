"""The methods on tensors in memory: one group by a row of the table, or whole state dicts."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.kernels.philox import Draw
from mixmerge.methods import REQUIRED, Method, Parameter, Role
from mixmerge.methods.records import misplaced
from mixmerge.methods.roles import role_of
from mixmerge.methods.sketch import Group, Sketch, Totals, add
from mixmerge.methods.sparsify import Cut, model_cuts
from mixmerge.registry import choices, find, load

StateDict = Mapping[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEERS_A_MASK = ("density", "gamma", "epsilon")  # plain numbers: masks are constants, no gradient gets there


def apply(
    method: Method,
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    parameters: Mapping[str, object],
    draw: Draw | None = None,
    cuts: Sequence[tuple[float, int]] | None = None,
    role: Role = "other",
    sketch: Any = None,
    statistics: Mapping[str, Sequence[Any]] | None = None,
) -> Tensor:
    """Call a method's definition on one tensor group.

    Args:
        method: a row of the table.
        tensors: the experts or their deltas, whichever ``method.takes``, in recipe order.
        base: needed where the row requires one, else not passed on.
        parameters: by their names in a recipe, checked already: one value per tensor for a parameter ``per``
            input or expert, one value otherwise. What is left out takes the default of the definition's
            signature (weight, t, and the density, gamma and epsilon of all but ``ties``, have none); what steers
            learning or gathering is not passed on.
        draw: seed and tensor name, passed on to stochastic rows only.
        cuts: thresholds per delta for ``scope: model``.
        role: what the tensor is for; passed on to rows with ``roles``.
        sketch: what the row's sketch found in the whole model; passed on to rows that have one.
        statistics: of calibration data, by name, one tensor for each of ``tensors``; passed on to rows with some.

    Shapes:
        tensors and base ``S`` each, result ``S``.

    Raises:
        MethodError: too few or many tensors, shapes that differ, no base or draw where one is needed, values
            that are not one per tensor.
    """
    options: dict[str, object] = {
        name + "_" if keyword.iskeyword(name) else name: value
        for name, value in parameters.items()
        if not ((parameter := method.parameter(name)) and parameter.learning)
    }
    faults = [*_count_faults(method, len(tensors), base is not None)]
    # What is read when it is asked for was held against the base's shape by the plan.
    group = list(tensors) if isinstance(tensors, list) else []
    if method.base == "required" and base is not None:
        group.append(base)
    if len({tensor.shape for tensor in group}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in group)
        faults.append(Fault(method.name, f"shapes differ: {shapes}"))
    for parameter in method.parameters:
        value = parameters.get(parameter.name)
        if parameter.per == "merge" or value is None:
            continue
        if not isinstance(value, Sequence) or len(value) != len(tensors):
            what = f"needs one value for each of {len(tensors)} tensors, got {value!r}"
            faults.append(Fault(parameter.name, what))
    if method.base == "required":
        options["base"] = base
    if method.stochastic:
        options["draw"] = draw
        if draw is None:
            faults.append(Fault(method.name, "draws at random and was given no draw"))
    if cuts is not None:
        options["cuts"] = cuts
    if method.roles:
        options["role"] = role
    if method.sketch:
        options["sketch"] = sketch
    if method.statistics:
        options["statistics"] = statistics
    if faults:
        raise MethodError(faults)
    merged: Tensor = load(method.function)(tensors, **options)
    return merged


def merge_state_dicts(
    method: str,
    experts: Sequence[StateDict],
    *,
    base: StateDict | None = None,
    parameters: Mapping[str, object] | None = None,
    expert_parameters: Sequence[Mapping[str, object]] = (),
    seed: int = 0,
    dtype: torch.dtype | None = None,
    model_type: str = "",
) -> dict[str, Tensor]:
    """Merge whole state dicts, tensor by tensor, in memory; gradients flow where the method has them.

    Each floating-point tensor is merged in float32 (float64 if one of its inputs is) and rounded once.
    Integer and boolean tensors must be equal everywhere and are copied. Names that share one storage in every
    input (tied weights) are merged once, under the first of them, and stay tied.

    Args:
        method: a name from the table of methods.
        experts: state dicts with the same names and shapes, in recipe order.
        base: where the method requires one; where it does not, one more input after the experts.
        parameters: for all inputs, by their names in a recipe. Numbers may be 0-D tensors, with gradients,
            except those that steer masks (density, gamma, epsilon).
        expert_parameters: one mapping per input (or none at all); wins over ``parameters``.
        seed: of the random masks, 0 to 2**64 - 1. A mask is a function of seed, position and tensor name.
        dtype: of the result; the base's own dtypes (or the first expert's) if not given.
        model_type: of the models' config: ``gpt2`` and its like store linear maps as inputs x outputs, which methods
            that tell inputs from outputs (``wudi``, ``iso_cts``, ``doge_ta``) have to know.

    Returns:
        One tensor per name, in the order of the base (or the first expert), sharing no storage with an input.

    Raises:
        MethodError: everything that does not fit, all at once: names, shapes, kinds of dtype, values that are
            not finite, unequal integer tensors; unknown, missing, misplaced or impossible parameters.
        MixmergeError: no method of that name.
    """
    row: Method = find("method", method)
    inputs = [*experts, base] if base is not None and row.base == "input" else list(experts)
    labels = [f"experts[{index}]" for index in range(len(experts))]
    labelled = dict(zip([*labels, "base"], [*experts, base], strict=True))
    present = {label: state for label, state in labelled.items() if state is not None}
    settled, faults = settle(row, len(inputs), parameters or {}, expert_parameters)
    faults = [*_count_faults(row, len(inputs), base is not None), *faults, *_tensor_faults(present)]
    if row.needs_data:
        faults.append(Fault(row.name, "needs calibration data", run="Use mixmerge.merge, with a recipe"))
    if not 0 <= seed < 2**64:
        faults.append(Fault("seed", f"is {seed}", "0 to 2**64 - 1"))
    if dtype is not None and not dtype.is_floating_point:
        faults.append(Fault("dtype", f"is {dtype}", "a floating-point dtype"))
    if faults:
        raise MethodError(faults)
    return _merge(row, inputs, base, settled, seed, dtype, model_type)


def settle(
    method: Method,
    count: int,
    parameters: Mapping[str, object],
    expert_parameters: Sequence[Mapping[str, object]],
) -> tuple[dict[str, object], list[Fault]]:
    """The value of every parameter (a tuple where it is per input or expert), and all that is wrong."""
    faults: list[Fault] = []
    if expert_parameters and len(expert_parameters) != count:
        what = f"{len(expert_parameters)} mappings for {count} inputs"
        faults.append(Fault("expert_parameters", what, "one per input, or none"))
    levels = {"parameters": parameters}
    levels |= {f"expert_parameters[{i}]": values for i, values in enumerate(expert_parameters)}
    for where, values in levels.items():
        for name, value in values.items():
            faults += _parameter_faults(method, f"{where}.{name}", name, value, where != "parameters")
    settled: dict[str, object] = {}
    for parameter in method.parameters:
        shared = _given(parameters, parameter.name, parameter.default)
        own = expert_parameters or [{}] * count
        each = tuple(_given(mapping, parameter.name, shared) for mapping in own)
        settled[parameter.name] = shared if parameter.per == "merge" else each
        lacking = [f"expert_parameters[{i}]" for i, value in enumerate(each) if _lacks(value)]
        if lacking:
            what = f"{method.name} needs {parameter.name!r} ({parameter.doc}) and it has no default"
            faults.append(Fault("parameters" if parameter.per == "merge" else ", ".join(lacking), what))
        elif parameter.position and isinstance(shared, Real) and misplaced(float(shared), count):
            faults.append(Fault(f"parameters.{parameter.name}", misplaced(float(shared), count)))
    return settled, faults


def _lacks(value: object) -> bool:
    return isinstance(value, str) and value == REQUIRED


def _given(values: Mapping[str, object], name: str, otherwise: object) -> object:
    value = values.get(name)
    return otherwise if value is None else value


def _parameter_faults(method: Method, where: str, name: str, value: object, per_expert: bool) -> list[Fault]:
    parameter = method.parameter(name)
    if name in method.no_effect:
        return [Fault(where, f"has no effect on {method.name}", run="leave it out")]
    if parameter is None:
        known = choices(name, [each.name for each in method.parameters])
        return [Fault(where, f"{method.name} has no parameter {name!r}", known)]
    if per_expert and parameter.per == "merge":
        what = f"{name!r} is one value for the whole merge, not one per expert"
        return [Fault(where, what, run="move it to parameters")]
    if value is None:
        return []
    if parameter.kind == "bool":
        return [] if isinstance(value, bool) else [Fault(where, f"is {value!r}", "true or false")]
    if parameter.kind == "choice":
        allowed = " or ".join(parameter.words)
        return (
            []
            if isinstance(value, str) and parameter.knows(value)
            else [Fault(where, f"is {value!r}", allowed)]
        )
    return _number_faults(parameter, where, value)


def _number_faults(parameter: Parameter, where: str, value: object) -> list[Fault]:
    if isinstance(value, Tensor) and parameter.name in STEERS_A_MASK:
        return [Fault(where, "is a tensor, but masks are constants", "a plain number")]
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        number = float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
    else:
        run = "" if parameter.per == "merge" else "give one per expert in expert_parameters"
        return [Fault(where, f"is {value!r}", "one number", run)]
    if not math.isfinite(number):
        return [Fault(where, f"is {number}", "a finite number")]
    if parameter.whole and not number.is_integer():
        return [Fault(where, f"is {number:g}", "a whole number")]
    if not parameter.low <= number <= parameter.high:
        return [Fault(where, f"is {number:g}", f"{parameter.low:g} to {parameter.high:g}")]
    return []


def _count_faults(method: Method, count: int, has_base: bool) -> list[Fault]:
    least, most = method.inputs
    faults = []
    if not least <= count <= most:
        allowed = f"exactly {least}" if least == most else f"at least {least}"
        faults.append(Fault("experts", f"{method.name} got {count}", allowed))
    if method.base == "required" and not has_base:
        faults.append(Fault("base", f"{method.name} needs a base and got none"))
    return faults


def _tensor_faults(states: Mapping[str, StateDict]) -> list[Fault]:
    """Everything in which the state dicts do not fit together."""
    names = dict.fromkeys(name for state in states.values() for name in state)
    faults = []
    for label, state in states.items():
        missing = [repr(name) for name in names if name not in state]
        if missing:
            faults.append(Fault(label, f"has no tensor {', '.join(missing)}", "the others have"))
    for name in names:
        group = {label: state[name] for label, state in states.items() if name in state}
        what = _misfit(group)
        if what:
            faults.append(Fault(f"tensor {name!r}", what))
    return faults


def _misfit(group: Mapping[str, Tensor]) -> str:
    """In what the inputs of one tensor do not fit together; empty if they do."""
    if len({tensor.shape for tensor in group.values()}) > 1:
        return "shapes differ: " + ", ".join(f"{label} {tuple(x.shape)}" for label, x in group.items())
    first = next(iter(group.values()))
    if not all(tensor.is_floating_point() for tensor in group.values()):
        if len({tensor.dtype for tensor in group.values()}) > 1:
            return "dtypes differ: " + ", ".join(f"{label} {x.dtype}" for label, x in group.items())
        if not all(torch.equal(tensor, first) for tensor in group.values()):
            return f"is {first.dtype}, which is copied, never merged; and its inputs are not equal"
        return ""
    strange = {str(x.dtype) for x in group.values() if x.dtype not in FLOATS}
    if strange:
        return f"has dtype {', '.join(strange)}, which cannot be merged"
    bad = [label for label, tensor in group.items() if not torch.isfinite(tensor.detach()).all()]
    return f"has NaN or infinite values in {', '.join(bad)}" if bad else ""


def _merge(
    row: Method,
    inputs: Sequence[StateDict],
    base: StateDict | None,
    settled: Mapping[str, object],
    seed: int,
    dtype: torch.dtype | None,
    model_type: str,
) -> dict[str, Tensor]:
    reference = inputs[0] if base is None else base
    owners = _owners(reference, [*inputs, reference])
    cuts = _cuts(row, inputs, base, settled, sorted(set(owners.values())))
    roles = {
        name: role_of(name, reference[name].shape, model_type) for name in owners if owners[name] == name
    }
    sketch = _sketched(row, inputs, base, settled, roles)
    merged: dict[str, Tensor] = {}
    for name, owner in owners.items():
        if owner != name:
            merged[name] = merged[owner]
        elif not reference[name].is_floating_point():
            merged[name] = reference[name].clone()
        else:
            tensors, origin = _group(row, inputs, base, name)
            result = apply(
                row,
                tensors,
                base=origin,
                parameters=settled,
                draw=Draw(seed, name),
                cuts=[each[name] for each in cuts] if cuts else None,
                role=roles[name],
                sketch=sketch,
            ).to(dtype or reference[name].dtype)
            if not torch.isfinite(result.detach()).all():
                what = f"the merged values do not fit {result.dtype}"
                raise MethodError(Fault(f"tensor {name!r}", what, run="a wider dtype or smaller weights"))
            merged[name] = result
    return merged


def _owners(reference: StateDict, states: Sequence[StateDict]) -> dict[str, str]:
    """Each name with the first name that is the same memory in every state dict: itself, if not tied."""
    first: dict[object, str] = {}
    owners = {}
    for name in reference:
        group = [state[name] for state in states]
        place = tuple((x.device, x.data_ptr(), x.dtype, x.shape, x.stride()) for x in group)
        owners[name] = first.setdefault(place, name)
    return owners


def _group(
    row: Method, inputs: Sequence[StateDict], base: StateDict | None, name: str
) -> tuple[list[Tensor], Tensor | None]:
    """The experts or deltas of one tensor, and its base, in the dtype they are merged in."""
    group = [state[name] for state in inputs]
    origin = None if base is None else base[name]
    wide = any(tensor.dtype == torch.float64 for tensor in (*group, *([] if origin is None else [origin])))
    work = torch.float64 if wide else torch.float32
    group = [tensor.to(work) for tensor in group]
    origin = None if origin is None else origin.to(work)
    if row.takes == "deltas" and origin is not None:
        group = [tensor - origin for tensor in group]
    return group, origin


def _sketched(
    row: Method,
    inputs: Sequence[StateDict],
    base: StateDict | None,
    settled: Mapping[str, Any],
    roles: Mapping[str, Role],
) -> Any:
    """What the method must know of the whole model first, if anything."""
    if not row.sketch:
        return None
    sketch: Sketch = load(row.sketch)()
    state = None
    for number in range(sketch.passes()):
        totals: Totals = {}
        for name, role in roles.items():
            if inputs[0][name].is_floating_point():
                tensors, origin = _group(row, inputs, base, name)
                totals = add(totals, sketch.observe(number, Group(tensors, origin, role, settled), state))
        state = sketch.settle(number, totals, state)
    return state


def _cuts(
    row: Method,
    inputs: Sequence[StateDict],
    base: StateDict | None,
    settled: Mapping[str, object],
    names: Sequence[str],
) -> list[dict[str, Cut]]:
    """Each expert's thresholds over its whole delta, where the method asks for that scope."""
    density = settled.get("density")
    if settled.get("scope") != "model" or base is None or not isinstance(density, tuple):
        return []
    return [
        model_cuts(
            {n: _group(row, [state], base, n)[0][0] for n in names if base[n].is_floating_point()}, share
        )
        for state, share in zip(inputs, density, strict=True)
    ]
