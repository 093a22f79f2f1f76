"""The sparse autoencoder and its training step: pure torch, no Ray, no I/O, no config objects.

Shapes are written with B rows of a batch, D = d_in, L = d_sae throughout. Uses no other floor.
"""
