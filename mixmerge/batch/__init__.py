"""Big jobs: requests in, groups of them answered by experts that are loaded once, answers out, nothing lost."""
