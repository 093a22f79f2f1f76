"""The language model and its text: names, tokens, activations, losses with an SAE. No Ray.

Uses `spec` and `sae`.
"""
