"""The merge method, its hooks into mergekit, and the run of a merge.

`method` registers the method and wraps mergekit's functions; `planned` is a checked
merge; `fit` runs the pre-pass or reuses its coefficients; `multimerge` and `stale` are
for mergekit-multi. Begin with `method`.
"""
