"""What is wrong with a config, before anything is downloaded or computed.

`config_file` reads the YAML, `inputs` its models, `models` says whether these fit each
other; `examine` does all that a merge needs and returns an `Examination`,
`examine_document` adds what `check` shows; `estimate` foretells time and memory;
`fingerprint` says what a coefficients file was made from. Begin with `examine`.
"""
