"""Carries plans out: streams tensors through the methods into a checkpoint folder."""
