"""Does the merged model think where the query needs it?

`holdout` keeps calibration queries out of the solving, `probes` sends them through the
merged layers at several scales, `figures` chooses the scale and sums up, and `opening`
asks whether the model that thinks opens its thinking by itself. Begin with `figures`.
"""
