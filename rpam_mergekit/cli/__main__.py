"""`python -m rpam_mergekit.cli` is `mergekit-rpam`."""

from rpam_mergekit.cli.main import main

if __name__ == "__main__":
    main()
