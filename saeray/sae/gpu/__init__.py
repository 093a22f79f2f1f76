"""The step of a standard SAE on a GPU: `sparse_step` and `dense_step` with their kernels in Triton.

Others take the dense step of `saeray.sae.gradients` in torch.
"""
