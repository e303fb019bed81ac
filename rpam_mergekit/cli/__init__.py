"""The command `mergekit-rpam`: options in, text out.

`main` is the group, with the commands in modules of their own. Those import nothing
heavy, so that help comes at once; what a command needs it imports when it runs. What
the commands do is in the other sub-packages.
"""
