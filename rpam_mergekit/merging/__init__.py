"""The merge method, its hooks into mergekit, and the run of a merge.

`hooks` wraps mergekit's `run_merge` and with it runs a merge from config to finished
folder; `merge` is a merge under way; `fit` runs the pre-pass or reuses its
coefficients; `method` is the kernel that mergekit calls for every tensor; `export`
writes a stock recipe; `multimerge` and `stale` are for mergekit-multi. Begin
with `hooks`.
"""
