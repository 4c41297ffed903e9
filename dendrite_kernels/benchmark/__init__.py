"""The layer against everything else a user could pick: verified, timed, weighed.

`python -m dendrite_kernels bench` and everything in the repository's bench/ measure with this.
"""
