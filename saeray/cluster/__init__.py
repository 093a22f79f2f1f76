"""The Ray roles. Each class is plain; `saeray.cluster.launch` decides where and with what it runs.

    TokenServer -> Harvesters -> ActivationBuffer -> Readers in packs -> Roster -> SAETrials

References travel through actors, tensors do not: the buffer and the roster never touch the bytes.
"""
