"""What lies beside a merged model, and how it is published.

`folder` names the files, `record` writes `rpam.json`, `card` the model card and
`stock_recipe` the recipe that mergekit runs without this plugin; `publish` chooses what
is uploaded and `repository` uploads it. Begin with `record`.
"""
