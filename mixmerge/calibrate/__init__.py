"""Data a merge may learn from: rows of text, statistics of what the experts do with them, learned coefficients."""
