"""Which method a recipe names, and the settings it has for the method's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mixmerge.document import Node, Report, read_mapping, read_text, show
from mixmerge.methods import Method, Parameter
from mixmerge.recipe.schema import Setting
from mixmerge.recipe.settings import read_setting
from mixmerge.registry import choices, find

# Keys and parameters of old mergekit recipes that mergekit itself no longer reads.
DEAD = ("input_model_parameters", "embed_slerp", "residual_weight")


def read_method(node: Node, rows: Mapping[str, Any], report: Report) -> tuple[str, Method | None]:
    """The name a recipe gives, and the row of that name."""
    name = read_text(node, report, "the name of a merge method")
    if name is None:
        return "", None
    if name not in rows:
        report.fault(node, f"no merge method is called {show(name)}", choices(name, list(rows)))
        return name, None
    row = rows[name]
    return name, row if isinstance(row, Method) else find("method", name)


def known_parameters(method: Method | None, rows: Mapping[str, Any]) -> dict[str, Parameter]:
    """The method's parameters; if there is no method, those of all methods, held to nothing but their kinds."""
    if method is not None:
        return {parameter.name: parameter for parameter in method.parameters}
    return {
        parameter.name: replace(parameter, low=-math.inf, high=math.inf, constant=False, whole=False)
        for row in rows.values()
        if isinstance(row, Method)
        for parameter in row.parameters
    }


@dataclass(frozen=True)
class Settings:
    """Reads ``parameters`` for one method; without a known method, for any."""

    method: Method | None
    known: dict[str, Parameter]
    rows: Mapping[str, Any]
    report: Report

    def read(
        self, parameters: Node | None, level: Literal["merge", "model", "base"]
    ) -> dict[str, Setting | None]:
        """The settings of one level: global, of a model, or of a base that is no expert."""
        nodes = read_mapping(parameters, self.report, "parameters") if parameters else {}
        settings: dict[str, Setting | None] = {}
        for name, node in nodes.items():
            parameter = self.known.get(name)
            if parameter is None:
                self.unknown(name, node)
            elif level != "merge" and parameter.per == "merge" and self.method:
                what = f"{name} has no effect under a model, here as in mergekit: it holds for all models"
                self.report.warn(node, what, run="Move it to the top-level parameters")
            elif level == "base":
                what = f"{name} has no effect on the base_model, here as in mergekit"
                self.report.warn(node, what, run="Remove it")
            else:
                setting = read_setting(node, parameter, self.report)
                if setting != ():
                    settings[name] = setting
            if self.report.full:
                break
        return settings

    def unknown(self, name: str, node: Node) -> None:
        no_effect = self.method.no_effect if self.method else ()
        if name in (*DEAD, "int8_mask", *no_effect):
            where = f" in {self.method.name}" if self.method else ""
            self.report.warn(node, f"{name} has no effect{where}, here as in mergekit", run="Remove it")
            return
        rows = [row for row in self.rows.values() if isinstance(row, Method)]
        having = sorted(row.name for row in rows if row.parameter(name))
        elsewhere = f" (it belongs to {', '.join(having)})" if having else ""
        what = f"unknown parameter {show(name)}{elsewhere}"
        self.report.fault(node, what, choices(name, list(self.known)))
