"""What every Ray process of ours needs: made, waited for, placed, and files on the head's disk.

Uses `files` and `spec`.
"""
