"""The mathematics: functions from tensors to tensors, without a model, a picture or a class.

`rank` finds the feasible rank, `gram` handles numerical precision, `hooi` truncates, `modes` decomposes, `projection`
makes maps. The only other packages imported here are torch, NumPy and TensorLy.
"""
