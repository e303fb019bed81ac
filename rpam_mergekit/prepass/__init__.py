"""The method: from calibration batches to merging coefficients.

`run` goes through the decoder layer by layer. `objective` is the loss on tensors and
`measures` what is taken of whole batches; `solver` minimises; `fields` are a layer's
coefficients as tensors to optimise; `memory` says what fits where. Begin with `run`.
"""
