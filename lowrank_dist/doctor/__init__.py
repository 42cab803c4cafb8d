"""Check before a run whether the available machines can train it, and give the remedy for each obstacle.

Whatever is checked may be missing or broken: a check that fails becomes a row of the result. software, machine,
network, inputs and storage give the rows of one node, which local.py orders. together.py has the ranks of a job meet,
and checks each of their nodes and the connections between them. rows.py merges all rows into one table. Imports are
late: until something is checked, only Python is needed.
"""
