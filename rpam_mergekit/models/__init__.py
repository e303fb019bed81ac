"""The models of a merge, through mergekit's loaders.

`layout` plans which tensors are merged, `weights` loads them, a layer of every model at
a time; `headers` reads names and shapes without weights, `adapters` merges LoRA
adapters, `references` says what is wrong with a model. What is changed in mergekit for
a while is in `patches`.
"""
