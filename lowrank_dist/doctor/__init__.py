"""Whether a run can be trained on the machines that are here, and what stands in its way.

Nothing that is looked at has to be there or intact: what fails is a row of the answer. A module a subject gives the
rows of one node (local.py puts them in order); together.py has the ranks of a job meet, looks at each of their nodes
and at what lies between them; findings.py makes one table of it. Imports are late: nothing here needs more than Python
until it is looked at.
"""
