"""What latent_codebook.py is made of: the two experts, the queries that need both, the rows and the page."""
