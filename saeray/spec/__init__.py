"""What is wanted, as plain data: the config, grids, plans, placement, the order of rows, messages.

Imports neither torch nor Ray, so a laptop or a Tune trial reads it in milliseconds. Uses `errors`.
"""
