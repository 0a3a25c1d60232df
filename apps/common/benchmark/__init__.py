"""The benchmark of training steps: a `clock` times all `contenders` on `problems`.

The contenders are fisherfn's own steps (`ours`), K-FAC of other libraries (`peers`) and other `optimizers`. `report`
and `picture` show the numbers.
"""
