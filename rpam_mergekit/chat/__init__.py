"""From a conversation to the tokens that the merged model will see.

`rendering` applies the chat template, `prompts` encodes the calibration queries.
`thinking` says who opens the thinking, the model or its chat template;
`template_rewriting` takes an opening out of a template, and `template_files` does so in
a model's folder. Begin with `prompts`.
"""
