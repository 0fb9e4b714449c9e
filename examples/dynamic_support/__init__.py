"""What examples/dynamic_real.py is made of."""
