"""Is this answer right, and did the response think before it?

`workers` grades responses in processes of their own; `answers` compares an answer with
the right one, by numbers, LaTeX and units; `responses` splits a response into thinking
and answer, and `brackets` knows what opens and closes the thinking.
"""
