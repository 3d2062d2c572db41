"""Tensors in, tensors out: the mathematics, without a model, a picture or a class.

`rank` says what is feasible, `gram` takes the numerical care, `hooi` truncates, `modes` decomposes, `projection` makes
maps. Of other packages torch, NumPy and TensorLy are imported here, no others.
"""
