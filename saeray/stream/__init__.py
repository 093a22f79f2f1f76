"""One pass of the language model, from text to batches, as Ray actors; knows of no sweep.

    TokenServer -> Harvesters -> ActivationBuffer -> Readers

References travel through actors, tensors do not: the buffer never touches the bytes. Classes are
plain; `launch` makes actors of them. Uses `actors`, `files`, `text`, `lm`, `spec`, `sae`.
"""
