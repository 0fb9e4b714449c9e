"""Logit fusion: what small experts changed in a small reference is done to the next-token logits of a larger base.

``shifts`` and ``matching`` are the maths, ``vocabulary`` maps tokens between tokenizers, ``engine`` decodes.
"""
