"""Experts as low-rank changes of one base, and gates that say how much of each a token gets.

Merges write banks, mixtures run them. One primitive carries all of it: ``y = W u + B (g * s * A u)``, the factors of
every expert side by side.
"""
