"""The language model: names, hook points, activations, losses with an SAE spliced in. No Ray.

Uses `spec` and `sae`.
"""
