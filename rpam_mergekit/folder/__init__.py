"""An output folder: whose it is, what of it is the base's, whether it is whole.

`contents` names the files of a merge and reads them, `earlier` says whether a folder
may be merged into and takes away what an earlier merge left, `model_config` and
`base_files` give the merged model the base's own files. Begin with `contents`.
"""
