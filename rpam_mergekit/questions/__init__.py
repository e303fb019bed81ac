"""From a data set's rows to questions with their right answers.

`rows` reads JSONL files and data sets of the Hub, `benchmarks` has the presets, `load`
makes questions of either; `leaks` keeps the questions of evaluation sets out of a
calibration file. Begin with `load`.
"""
