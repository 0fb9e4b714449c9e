"""What a gate is: a small module that gives the weights of a bank's experts, for rows or for tokens.

Legend: B rows, T tokens, E experts, d width of a site's inputs, h width of the model, f of features of a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor, nn

from mixmerge.bank.mix import How, Mix
from mixmerge.bank.records import Bank
from mixmerge.errors import Fault

Features = Literal["", "hidden", "layers", "text"]
Want = Literal["model", "rows", "rows of each expert", "encode", "given"]


@dataclass(frozen=True, eq=False)
class Run:
    """What a gate knows beside a site's inputs while a batch goes through the model.

    Args:
        rows: ``(B, S)``: what ``Gate.query`` gave for each row, when its prompt was read; None if it gives nothing.
        hidden: ``(B, T, h)``: the base's last hidden states of the same tokens, from a pass without the bank; only
            for a gate whose ``second_pass`` is True.
        mask: ``(B, T)``, True for tokens that are no padding; None if there is no padding.
    """

    rows: Tensor | None = None
    hidden: Tensor | None = None
    mask: Tensor | None = None

    @cached_property
    def of_rows(self) -> Mix | None:
        """``rows`` as weights of experts, for gates whose query gives those."""
        return None if self.rows is None else Mix(self.rows)


class Gate(nn.Module):
    """Weights of experts.

    A row's weights depend on nothing but that row: never on its batch-mates, its padding or its place; a token's on
    nothing that comes after it. In evaluation mode a call changes no state.

    ``kind``: its name in ``GATES``. ``features``: what ``query`` is given of each prompt: nothing; ``hidden``, the mean
    over the prompt's tokens of the base's last hidden states; ``layers``, the same of all layers; ``text``, the
    features of a text encoder.
    ``second_pass``: it wants the base's hidden states of every token (``Run.hidden``). ``open_to_new``: it may be used
    with experts that were added to its bank later, of which it was told nothing. What is saved of a gate is its
    ``kind``, ``settings()``, of which ``build`` makes it again, and its ``state_dict``.

    For ``fitting.fit_gate``: ``options``, the strict model of what a user may say of it; ``fitter``, the
    ``module:function`` that fits it, none if ``build({})`` is all; ``wants``, what that takes beside a bank;
    ``grows``: ``fitting.with_expert`` can make it one for an expert more without fitting it again for the others.
    """

    kind: ClassVar[str]
    features: ClassVar[Features] = ""
    second_pass: ClassVar[bool] = False
    open_to_new: ClassVar[bool] = False
    options: ClassVar[type[BaseModel] | None] = None
    fitter: ClassVar[str] = ""
    wants: ClassVar[tuple[Want, ...]] = ()
    grows: ClassVar[bool] = False

    @classmethod
    def faults(cls, bank: Bank, options: BaseModel) -> list[Fault]:
        """Why it cannot be a gate of this bank with these options; empty if it can."""
        return []

    def bind(self, bank: Bank) -> None:
        """Told the bank it speaks for, on its device, before it is asked. What it keeps of it is not saved."""

    def settings(self) -> dict[str, Any]:
        """JSON values that say everything of it but its tensors' values."""
        return {}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Gate:
        """A gate of what ``settings()`` said, with tensors of the right shapes and any values."""
        return cls(**settings)

    def known(self) -> int | None:
        """How many experts it has weights for; None: it was told of none."""
        return None

    def grown(self, bank: Bank) -> Gate:
        """The gate for a bank with one expert more, the last, of which nothing has to be learned; of one that
        ``grows``."""
        raise NotImplementedError

    def fixed(self) -> tuple[Tensor, How] | None:
        """``(E,)`` the weights that every token gets at every site, and how they mix; None where they are said with
        each batch, or depend on the input."""
        return None

    def query(self, features: Tensor) -> Tensor:
        """``(B, f)`` features of prompts to ``(B, S)``, kept for each row while it is answered."""
        raise NotImplementedError

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        """The weights at a site; None for the base alone.

        Args:
            site: its name in the bank; of a vector too, whose mix is by expert and for a row or a token.
            u: ``(B, T, d)`` its inputs; of an embedding ``(B, T)`` tokens.
            run: of the batch.
        """
        raise NotImplementedError


class RowGate(Gate):
    """Every row has its own weights, given with the batch: a task's id, an oracle, a fixed mixture."""

    kind = "given"
    open_to_new = True
    grows = True

    def grown(self, bank: Bank) -> RowGate:
        return RowGate()

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        return run.of_rows
