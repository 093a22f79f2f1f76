"""The Ray roles. Each class is plain; `saeray.cluster.launch` decides where and with what it runs.

    TokenServer -> Harvesters -> ActivationBuffer -> Readers in packs -> Roster -> SAETrials

The roster is in four: `sweep_state` is what it knows, `settling` makes results of reports,
`dispatch` gets packs and streams running, `roster` itself is what others may ask.

References travel through actors, tensors do not: the buffer and the roster never touch the bytes.
"""
