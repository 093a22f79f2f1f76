"""The user's side: command line, `sweep` and `resume`, sweeps from a laptop, status, live view.

Uses `cluster`, `actors`, `files`, `lm`, `spec` and `sae`.
"""
