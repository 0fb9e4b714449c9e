"""Latent interaction: frozen experts that read each other's hidden states across tokenizers, widths and families.

Peers read a text first and leave *latents*; the primary answers and attends to them at a few depths. What is trained
and saved is the glue between them, never an expert.
"""
