"""The command `mergekit-rpam`: options in, text out.

`main` is the group, with the subcommands in modules of their own, imported when they
are called. What they do is in the other sub-packages.
"""
