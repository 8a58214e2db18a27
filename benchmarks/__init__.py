"""Times fusedrnn against torch.nn, layer by layer: ``python -m benchmarks --help``.

cases.py is the one list of what is timed, measure.py builds, checks and times a case, report.py and plot.py write
what was found. Nothing is left out of a report: losses stand beside wins.
"""
