"""What is written and read back: folders anywhere, checkpoints, the cache, results, logs. No Ray.

Uses `spec` and `sae`.
"""
