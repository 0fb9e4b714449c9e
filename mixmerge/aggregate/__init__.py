"""From many answers to one: compositions, as pure functions of what experts have said.

A composition asks experts in stages. ``first`` says whom to ask about a query that has been routed; ``then`` looks at
what they said, and asks again or settles. Who runs the stages, in what batches and on what devices, is not its matter.

``table.COMPOSITIONS`` is the table of their names, ``table.composition`` makes one. A package of yours adds one by an
entry point of the group ``mixmerge.composition`` that gives a ``table.CompositionRow``.
"""

from __future__ import annotations

from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled

__all__ = ["Ask", "Composition", "Question", "Said", "Settled"]
