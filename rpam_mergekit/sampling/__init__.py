"""From a data set to graded responses of the experts, and to labels.

`questions` reads a data set, `run` asks a model (`local` or on a `server`) and grades,
`read_samples` reads the responses again, and `labels` chooses which pattern each query
teaches. Begin with `run`.
"""
