"""What a merge learns from rows of text: statistics of what the experts do with them, and coefficients."""
