"""What a training step costs: `problems` are timed by a `clock` for all `contenders`.

These are fisherfn's own steps (`ours`), K-FAC of other libraries (`peers`) and other `optimizers`; `report` and
`picture` show the numbers.
"""
