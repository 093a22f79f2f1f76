"""One sweep's control, in Ray: its trials, their roster, and the packs that train its SAEs.

    Readers in packs -> Roster -> SAETrials

The roster is in parts: `sweep_state` is what it knows, `reports` makes results of packs' reports,
`dispatch` gets packs running and `streams` what they read, `roster` itself is what others may ask.
Uses `stream`, `actors`, `files`, `lm`, `spec`, `sae`.
"""
