"""Runs a model's decoder layers one at a time, with any weights.

`decoder` records once how the model's own code calls every layer (`calls`) and replays
a layer on hidden states. A stream (`streams`) holds a batch's hidden states, of every
expert (`experts`) and of the merged model; `recording` begins them, `activations`
stores them, `token_weights` says what a token counts. `layer_weights` merges a layer.
"""
