"""Pages to look at: what a sweep's folder holds, as HTML files that stand alone. No Ray.

Uses `files` and `spec`. Templates are in `templates/`, styles and scripts in `assets/`.
"""
