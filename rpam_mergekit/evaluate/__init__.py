"""Is the merged model adaptive? Figures, intervals and reports.

`compare` takes the figures of all models, with bootstrap intervals; `yardsticks` are
the interpolation sweep, its hull and a perfect router. The modules in `_report` make
text, tables and pictures. `compare_files` reads the sample files that are compared,
`sweep` makes those of the interpolations. Begin with `compare`.
"""
