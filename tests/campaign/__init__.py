"""A campaign of faults: what must never happen, tried as often as one can afford.

Processes are killed at the n-th change to the disk, disks fill up, bits flip, headers are mutated, directories are
hostile, sources change, permissions are missing. After each fault: nothing that was read has changed, nothing that is
not whole stands at the destination, what ends without an error has the right bytes, what ends with one has a named
one, and nothing waits for ever. ``make campaign`` runs it at the size that its arguments say; its small version is a
test.
"""
