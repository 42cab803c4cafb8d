"""Says before a run whether the machines that are here can train it, and the remedy for what stands in its way.

Nothing that is looked at has to be there or intact: what fails is a row of the answer. software, machine, network,
inputs and storage give the rows of one node, which local.py puts in order; together.py has the ranks of a job meet,
looks at each of their nodes and at what lies between them; rows.py makes one table of it. Imports are late: nothing
here needs more than Python until it is looked at.
"""
