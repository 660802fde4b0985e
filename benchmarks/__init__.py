"""What is measured, against which peers, in the same run on the same bytes; equality is asserted before anything is
timed.
"""
