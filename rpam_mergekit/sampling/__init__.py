"""From a data set to graded responses of the experts, and to labels.

`request` says what is asked for. `sample` samples a model: `run` asks it (`local` or on
a `server`) and grades. `label_files` labels: `read_samples` reads the responses again
(`other_formats` those of other programs), and `labels` chooses which pattern each query
teaches. Begin with `sample`.
"""
