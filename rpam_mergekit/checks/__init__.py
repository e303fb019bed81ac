"""What is wrong with a config, before anything is downloaded or computed.

`config_file` reads the YAML, `inputs` its models, `matching` whether these fit each
other; `examine` does all that a merge needs, `inspection` all that `check` shows;
`estimate` foretells time and memory. Begin with `examine`.
"""
