"""Rows of text that models are shown: where they come from, which are taken, and how they become batches."""
