"""The files that this project defines: read, validated and written whole.

`calibration` (labelled queries), `samples` (graded responses), `coefficients` (what the
pre-pass solved), `solved_layers` (the same, while it runs), `operating_point` (how the
merge routes). `hub_path` finds them on the Hub. Begin with `calibration`.
"""
