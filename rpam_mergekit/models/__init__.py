"""The models of a merge, through mergekit's loaders.

`checkpoint` plans which tensors are merged and loads them, `weights` hands a layer of
every model to the pre-pass; `headers` reads names and shapes without weights,
`adapters` merges LoRA adapters, `references` finds models on disk and Hub.
"""
