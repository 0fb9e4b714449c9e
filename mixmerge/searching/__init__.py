"""Black-box search of a recipe's hyper-parameters: merge, score, ask for the next, keep the best."""
