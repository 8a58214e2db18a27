"""Everything there is to run on a machine with a GPU: ``make gpu``, or ``python -m benchmarks.gpu --help``.

needs.py says what the machine lacks, parts.py runs build, tests, sanitizer and timing, each a process of its own,
timing.py measures (opponents.py: other people's kernels), report.py writes what was found.
"""
